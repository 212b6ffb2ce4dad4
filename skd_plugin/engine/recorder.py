"""What a trace says of the tokens that a step has emitted.

Shapes: M emitted tokens, V vocabulary, K teacher entries kept a token, J width of the teacher, R tokens of a
response, F columns of what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skd_plugin.core.copies import Arriving
from skd_plugin.core.logit_rows import LogitRows, in_parts
from skd_plugin.core.trace import NOTHING, OVERLAP, Trace

_KNOWN = ("response_ids", "source", "rejected_ids", "draft_rank", "student_version")  # columns of `Part.known_MC`
# The first columns of `Part.figures_MF`; behind them are the teacher's entries: K log-probabilities, and K ids.
_FIGURES = (
    "student_logp", "teacher_logp", "kl", "student_entropy", "teacher_entropy", "teacher_rest_tempered", "top_overlap",
    "same_first",
)  # fmt: skip


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
        entries = self.teacher_top_k + min(self.student_top_k, student.values_SV.shape[1])
        width = len(_FIGURES) + 2 * entries
        figures_MF = torch.empty(len(token_M), width, dtype=torch.int32, device=token_M.device)
        for rows in in_parts(len(token_M), teacher.values_SV):
            self._look(figures_MF[rows], token_M[rows, None], teacher.select(rows), student.select(rows))
        return Part(known_MC, Arriving(figures_MF), None if hidden_MJ is None else Arriving(hidden_MJ))

    def _look(self, figures_MF: torch.Tensor, token_M1: torch.Tensor, teacher: LogitRows, student: LogitRows) -> None:
        """Fills in the figures."""
        teacher_MV, student_MV = teacher.read().log_softmax(-1), student.read().log_softmax(-1)
        first = min(OVERLAP, teacher_MV.shape[1])
        student_top_k = min(self.student_top_k, student_MV.shape[1])
        top_MK, ids_MK = teacher_MV.topk(max(self.teacher_top_k, first), dim=-1)
        own_MK = student_MV.topk(max(student_top_k, first), dim=-1).indices
        agreement = _agreement(ids_MK[:, :first], own_MK[:, :first])
        top_MK, ids_MK = top_MK[:, : self.teacher_top_k], ids_MK[:, : self.teacher_top_k]
        entries_MK = ids_MK
        if student_top_k:
            own_MK = own_MK[:, :student_top_k]
            again_MK = (own_MK[:, :, None] == ids_MK[:, None]).any(-1)
            top_MK = torch.cat([top_MK, teacher_MV.gather(1, own_MK).masked_fill(again_MK, -torch.inf)], 1)
            entries_MK = torch.cat([ids_MK, own_MK.masked_fill(again_MK, NOTHING)], 1)
            ids_MK = torch.cat([ids_MK, own_MK], 1)
        p_MV = teacher_MV.exp()
        others_MV = p_MV if self.loss_temperature == 1 else (teacher_MV / self.loss_temperature).exp_()
        columns = [
            student_MV.gather(1, token_M1),
            teacher_MV.gather(1, token_M1),
            _mean(p_MV, teacher_MV - student_MV),
            -_mean(student_MV.exp(), student_MV),
            -_mean(p_MV, teacher_MV),
            # Masses are sums, and not 1 less the others: that would be what rounding has left.
            others_MV.scatter_(1, ids_MK, 0.0).scatter_(1, token_M1, 0.0).sum(-1, keepdim=True).log_(),
            *agreement,
        ]
        numbers = torch.cat([*columns, top_MK], dim=1)
        figures_MF[:, : numbers.shape[1]] = numbers.view(torch.int32)
        figures_MF[:, numbers.shape[1] :] = entries_MK


def _mean(probs_MV: torch.Tensor, values_MV: torch.Tensor) -> torch.Tensor:
    """Mean of the values [M, 1], in whose place it writes. What has no probability adds nothing, infinite or not."""
    product_MV = values_MV.mul_(probs_MV)
    return product_MV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(-1, keepdim=True)


def _agreement(theirs_MC: torch.Tensor, own_MC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the tokens at the top are the same in both models, and whether the first is, [M, 1] each."""
    shared_MC = (theirs_MC[:, :, None] == own_MC[:, None]).any(-1)
    return shared_MC.float().mean(-1, keepdim=True), (theirs_MC[:, :1] == own_MC[:, :1]).float()


def to_trace(parts: Sequence[tuple[Part, int, int]]) -> Trace:
    """Args: parts: at least one, each with the first of its tokens and the one after the last."""
    known_RC = torch.cat([part.known_MC[start:end] for part, start, end in parts])
    figures_RF = torch.cat([part.figures_MF.read()[start:end] for part, start, end in parts])
    hidden = [part.hidden_MJ.read()[start:end] for part, start, end in parts if part.hidden_MJ is not None]
    count = (figures_RF.shape[1] - len(_FIGURES)) // 2
    own = dict(zip(_KNOWN, map(_own, known_RC.T), strict=True))
    numbers_RF = figures_RF.view(torch.float32)
    own |= {name: _own(numbers_RF[:, place]) for place, name in enumerate(_FIGURES)}
    return Trace(
        **own | {"source": own["source"].to(torch.uint8)},
        teacher_topk_logp=_own(numbers_RF[:, len(_FIGURES) : -count]),
        teacher_topk_ids=_own(figures_RF[:, -count:]),
        **({"teacher_hidden": torch.cat(hidden)} if hidden else {}),
    )


def _own(columns: torch.Tensor) -> torch.Tensor:
    """Of its own memory, for a trace goes to other processes field by field; and in one piece also where it is a
    single token, which a plain copy leaves at the table's stride, and vLLM cannot send.
    """
    return columns.clone(memory_format=torch.contiguous_format)
