"""The student on a prompt of its own, where a request of the engine holds the teacher's.

The teacher's prompt has n_t tokens, the student's n_s, which are not more. The same response follows both, so the
student always stands d = n_t - n_s places before the teacher. Its layers keep their keys and values behind the same
table of blocks as the teacher's. They lie in the blocks of the end of the teacher's prompt and of the response: the
student's table leaves out the first d // block size blocks, in which nothing of the student is. So a long beginning
that many prompts of the teacher share is in the engine once, and so is what the samples of one prompt share.

Shapes: B requests, N tokens that the student reads in a step, W blocks of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from skd_plugin.core.trace import NOTHING
from skd_plugin.engine.request import RequestParams


class Reading(NamedTuple):
    """What the student reads in a step. All of it is known on the host, so nothing waits for the device."""

    kept_N: np.ndarray  # int64, places among the tokens that vLLM has laid out for the step
    row_N: np.ndarray  # int64, their requests
    ids_N: np.ndarray  # int64, tokens of prompts of the student's own; NOTHING: vLLM's token
    starts: np.ndarray  # int32 [B + 1], of each request's tokens
    has_begun_B: (
        np.ndarray
    )  # bool; else the step ends before the student's prompt begins, and its token counts nothing


@dataclass(frozen=True)
class StudentPrompts:
    """Those of a batch, on the host."""

    ids: Sequence[Sequence[int] | None]  # None: the student reads what the teacher does
    length_B: np.ndarray  # int64, n_s
    shift_B: np.ndarray  # int64, d

    @classmethod
    def of(cls, params: Sequence[RequestParams]) -> StudentPrompts | None:
        """None where no request has one."""
        if all(p.student_ids is None for p in params):
            return None
        lengths, shifts = [p.prompt_len for p in params], [p.shift for p in params]
        return cls([p.student_ids for p in params], np.array(lengths), np.array(shifts))

    def reading(self, first_B: np.ndarray, starts: np.ndarray) -> Reading:
        """
        Args:
            first_B: the teacher's position of each request's first token in the step.
            starts: [B + 1], where the tokens of each request start in vLLM's layout.
        """
        counts_B = np.diff(starts).astype(np.int64)
        own_B = first_B - self.shift_B  # the student's position of the same token
        dropped_B = np.clip(-own_B, 0, counts_B - 1)  # a token at least stays: no kernel expects an empty query
        kept_B = counts_B - dropped_B
        own_starts = np.concatenate([[0], kept_B.cumsum()])
        row_N = np.repeat(np.arange(len(kept_B)), kept_B)
        moved_B = starts[:-1] + dropped_B - own_starts[:-1]
        ids_N = np.full(len(row_N), NOTHING)
        begins_B = own_B + dropped_B
        for row in np.flatnonzero(begins_B < self.length_B):  # few: those whose prompt is read in this step
            ids, begin, start = self.ids[row], max(begins_B[row], 0), own_starts[row]
            if ids is not None:
                part = ids[begin : begin + kept_B[row]]
                ids_N[start : start + len(part)] = part
        has_begun_B = own_B + counts_B > 0
        return Reading(np.arange(len(row_N)) + moved_B[row_N], row_N, ids_N, own_starts.astype(np.int32), has_begun_B)


def own_table(table_BW: torch.Tensor, skipped_B: torch.Tensor, has_begun_B: torch.Tensor) -> torch.Tensor:
    """The blocks of the student: a request's own without the `skipped` first ones. Before the student's prompt has
    begun, those may not be there yet, and vLLM's null block stands for them, which belongs to nobody.
    """
    width = table_BW.shape[1]
    place_BW = torch.arange(width, device=table_BW.device) + skipped_B[:, None]
    return table_BW.gather(1, place_BW.clamp(max=width - 1)) * has_begun_B[:, None]
