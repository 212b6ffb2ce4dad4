"""What a trace says of the tokens that a step has emitted.

Shapes: M emitted tokens, V vocabulary, K teacher entries kept a token, J width of the teacher, R tokens of a
response, F columns of what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skd_plugin.core.copies import Arriving
from skd_plugin.core.logit_rows import LogitRows, Wanted
from skd_plugin.core.trace import NOTHING, OVERLAP, Trace

_KNOWN = ("response_ids", "source", "rejected_ids", "draft_rank", "student_version")  # columns of `Part.known_MC`
# The first columns of `Part.figures_MF`; behind them are the teacher's entries: K log-probabilities, and K ids.
_FIGURES = (
    "student_logp", "teacher_logp", "kl", "student_entropy", "teacher_entropy", "teacher_rest_tempered", "top_overlap",
    "same_first",
)  # fmt: skip


NO_HIDDEN = torch.empty(0, 0)


@dataclass(frozen=True)
class Part:
    """The tokens that a step has emitted, request by request."""

    known_MC: torch.Tensor  # int32
    figures_MF: Arriving  # int32: the bits of float32 numbers, and ids
    hidden_MJ: Arriving | None

    def settle(self) -> None:
        """Waits for what is on its way."""
        self.figures_MF.read()
        if self.hidden_MJ is not None:
            self.hidden_MJ.read()


@dataclass(frozen=True)
class Recorder:
    teacher_top_k: int
    student_top_k: int  # K is the sum of both
    loss_temperature: float

    def record(
        self,
        known_MC: torch.Tensor,
        token_M: torch.Tensor,
        teacher: LogitRows,
        student: LogitRows,
        hidden_MJ: torch.Tensor | None,
    ) -> Part:
        """Of emitted tokens.

        Args:
            known_MC: what the sampler says of them, in ordinary memory; the columns are `_KNOWN`.
            token_M: int64, they themselves.
            teacher, student: the logits [M] at their places. Each row is read once.
            hidden_MJ: what the teacher's head made its logits of; None: not kept.
        """
        seen = teacher.look(student, token_M, self.wanted)
        top_MK, ids_MK = seen.teacher_top_NK[:, : self.teacher_top_k], seen.teacher_ids_NK[:, : self.teacher_top_k]
        if self.student_top_k:
            own_MC = seen.student_ids_NC[:, : self.student_top_k]
            again_MC = (own_MC[:, :, None] == ids_MK[:, None]).any(-1)
            own_logp_MC = seen.teacher_own_NC[:, : self.student_top_k].masked_fill(again_MC, -torch.inf)
            top_MK = torch.cat([top_MK, own_logp_MC], 1)
            ids_MK = torch.cat([ids_MK, own_MC.masked_fill(again_MC, NOTHING)], 1)
        columns = [
            seen.student_logp_N1,
            seen.teacher_logp_N1,
            seen.kl_N1,
            seen.student_entropy_N1,
            seen.teacher_entropy_N1,
            seen.rest_N1,
            *_agreement(seen.teacher_ids_NK[:, :OVERLAP], seen.student_ids_NC[:, :OVERLAP]),
            top_MK,
        ]
        figures_MF = torch.cat([torch.cat(columns, dim=1).view(torch.int32), ids_MK.int()], dim=1)
        return Part(known_MC, Arriving(figures_MF), None if hidden_MJ is None else Arriving(hidden_MJ))

    @property
    def wanted(self) -> Wanted:
        """Of the two models' rows."""
        first = max(self.teacher_top_k, OVERLAP), max(self.student_top_k, OVERLAP)
        return Wanted(*first, self.teacher_top_k, self.student_top_k, self.loss_temperature)


def _agreement(theirs_MC: torch.Tensor, own_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the tokens at the top are the same in both models, and whether the first is, [M, 1] each."""
    shared_MC = (theirs_MC[:, :, None] == own_MC[:, None]).any(-1)
    return shared_MC.float().mean(-1, keepdim=True), (theirs_MC[:, :1] == own_MC[:, :1]).float()


@dataclass(frozen=True)
class Record:
    """What a trace is made of, on its way from the engine's process: three tensors are sent sooner than seventeen."""

    known_RC: torch.Tensor
    figures_RF: torch.Tensor
    hidden_RJ: torch.Tensor  # [R, 0]: not kept

    @classmethod
    def of(cls, parts: Sequence[tuple[Part, int, int]], entries: int) -> Record:
        """
        Args:
            parts: of a response, each with the first of its tokens and the one after the last.
            entries: K, of a response without a token.
        """
        if not parts:
            known_0C = torch.empty(0, len(_KNOWN), dtype=torch.int32)
            return cls(known_0C, known_0C.new_empty(0, len(_FIGURES) + 2 * entries), NO_HIDDEN)
        hidden = [part.hidden_MJ.read()[start:end] for part, start, end in parts if part.hidden_MJ is not None]
        known_RC = torch.cat([part.known_MC[start:end] for part, start, end in parts])
        figures_RF = torch.cat([part.figures_MF.read()[start:end] for part, start, end in parts])
        return cls(known_RC, figures_RF, torch.cat(hidden) if hidden else NO_HIDDEN)

    def figure(self, name: str) -> torch.Tensor:
        """One of `_FIGURES`: float32 [R], a view."""
        return self.figures_RF[:, _FIGURES.index(name)].view(torch.float32)

    def trace(self) -> Trace:
        """Its columns are views of these tensors."""
        count = (self.figures_RF.shape[1] - len(_FIGURES)) // 2
        known = dict(zip(_KNOWN, self.known_RC.unbind(1), strict=True))
        return Trace(
            **known | {"source": known["source"].to(torch.uint8)},
            **{name: self.figure(name) for name in _FIGURES},
            teacher_topk_logp=self.figures_RF[:, len(_FIGURES) : -count].view(torch.float32),
            teacher_topk_ids=self.figures_RF[:, -count:],
            teacher_hidden=self.hidden_RJ,
        )
