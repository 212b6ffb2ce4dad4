"""Rows of logits that stay where a model has put them, read some at a time.

At 256 requests with 5 drafts each and 151,936 entries one tensor [N, V] in float32 has 778 MB. So nothing here makes
one: who needs distributions reads the rows of a part, in float32, and lets go of them before the next.

Shapes: N rows, V vocabulary entries, S rows of the tensor in which they lie, K and C entries at the top of the teacher
and of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from skd_plugin.core.end_event import join_ends_
from skd_plugin.core.sampling import Model, SettingRows, draw, warp_of
from skd_plugin.core.top_k import top_k

# Entries of the rows that are read at once. In float32 they are 4 MB, which stay in the cache of a CPU core, or 64 MB
# on a GPU, where fewer would be more kernels to start than work for them.
ENTRIES_ON_CPU = 1 << 20
ENTRIES_ON_GPU = 1 << 24


class Wanted(NamedTuple):
    """What is to be known of two models' rows."""

    teacher_top: int  # entries at the top of the teacher, K
    student_top: int  # and of the student, C; there may be fewer in a vocabulary
    teacher_kept: int  # of the K those that are named in a trace, with their probability; the rest is a sum
    student_kept: int  # of the C
    temperature: float  # of the rest


class Seen(NamedTuple):
    """What two models say at N places, in nats, float32. Log-probabilities are at temperature 1."""

    student_logp_N1: torch.Tensor  # of the token
    teacher_logp_N1: torch.Tensor
    kl_N1: torch.Tensor  # KL(p||q)
    student_entropy_N1: torch.Tensor
    teacher_entropy_N1: torch.Tensor
    rest_N1: torch.Tensor  # log of the teacher's tempered mass, not normalised, of what is not kept and not the token
    teacher_top_NK: torch.Tensor  # the teacher's log-probabilities at the top, the highest first
    teacher_ids_NK: torch.Tensor  # int64, whose they are
    teacher_own_NC: torch.Tensor  # the teacher's log-probabilities of the student's top
    student_ids_NC: torch.Tensor  # int64, the highest first


@dataclass(frozen=True)
class LogitRows:
    values_SV: torch.Tensor  # any float type
    rows_N: torch.Tensor  # int64, the row of each
    ends_E: torch.Tensor | None = None  # int64, tokens that end a turn, read as one; None: each by itself

    @classmethod
    def of(cls, values_NV: torch.Tensor) -> LogitRows:
        """All rows of a tensor."""
        return cls(values_NV, torch.arange(len(values_NV), device=values_NV.device))

    def select(self, rows: torch.Tensor | slice) -> Self:
        return type(self)(self.values_SV, self.rows_N[rows], self.ends_E)

    def read(self) -> torch.Tensor:
        """float32 [N, V], the caller's own to write into."""
        read_NV = self.values_SV.index_select(0, self.rows_N).float()
        return read_NV if self.ends_E is None else join_ends_(read_NV, self.ends_E)

    def rank(self, token_N: torch.Tensor) -> torch.Tensor:
        """`rank` of a token in each row, int64 [N]."""
        rank_N = torch.empty_like(token_N)
        for rows in in_parts(len(token_N), self.values_SV):
            rank_N[rows] = rank(self.select(rows).read(), token_N[rows])
        return rank_N

    def warp(self, settings: SettingRows, model: Model) -> torch.Tensor:
        """Probabilities after temperature and nucleus, float32 [N, V]: `sampling.warp` with a model's settings [N]."""
        return warp_of(self.read(), settings, model)

    def sample(self, settings: SettingRows, model: Model, uniform_N: torch.Tensor) -> torch.Tensor:
        """One token a row, int64 [N], from what `warp` makes of it.

        Args:
            settings: [N].
            uniform_N: float64 [N], in (0, 1], at least one.
        """
        parts = in_parts(len(uniform_N), self.values_SV)
        if len(parts) == 1:
            return draw(self.warp(settings, model), uniform_N)
        return torch.cat([self.select(own).sample(settings.select(own), model, uniform_N[own]) for own in parts])

    def look(self, student: LogitRows, token_N: torch.Tensor, wanted: Wanted) -> Seen:
        """These rows are the teacher's. Each row is read once. Args: token_N: int64, at least one."""
        parts = in_parts(len(token_N), self.values_SV)
        seen = [_look(self.select(part), student.select(part), token_N[part, None], wanted) for part in parts]
        return Seen(*map(torch.cat, zip(*seen, strict=True)))


def in_parts(count: int, values_SV: torch.Tensor, width: int | None = None) -> list[slice]:
    """Of `count` rows of these logits some at a time, as many as may be read at once.

    Args:
        width: entries of a row that are read; None: all.
    """
    entries = ENTRIES_ON_CPU if values_SV.device.type == "cpu" else ENTRIES_ON_GPU
    step = max(1, entries // (width or values_SV.shape[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def rank(logits_NV: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    """Rank of a token: 0 is the most probable; the lower id goes first among equal logits.

    Args:
        logits_NV: float32, in which a count is exact up to 2^24.

    Returns:
        int64 [N].
    """
    own_N1, token_N1 = logits_NV.gather(1, token_N[:, None]), token_N[:, None].to(logits_NV.dtype)
    ids_V = torch.arange(logits_NV.shape[1], dtype=logits_NV.dtype, device=token_N.device)
    # Ones and zeros in the type of the logits: a sum of bools would be one of 64-bit integers.
    one_NV, before_NV = torch.empty_like(logits_NV), torch.empty_like(logits_NV)
    above_N = torch.gt(logits_NV, own_N1, out=one_NV).sum(-1)
    torch.eq(logits_NV, own_N1, out=one_NV)
    tied_before_N = one_NV.mul_(torch.lt(ids_V, token_N1, out=before_NV)).sum(-1)
    return (above_N + tied_before_N).long()


def _look(teacher: LogitRows, student: LogitRows, token_N1: torch.Tensor, wanted: Wanted) -> Seen:
    teacher_NV, student_NV = teacher.read().log_softmax(-1), student.read().log_softmax(-1)
    vocab_size = teacher_NV.shape[1]
    top_NK, ids_NK = top_k(teacher_NV, min(wanted.teacher_top, vocab_size))
    own_NC = top_k(student_NV, min(wanted.student_top, vocab_size))[1]
    teacher_own_NC = teacher_NV.gather(1, own_NC)
    student_logp_N1, teacher_logp_N1 = student_NV.gather(1, token_N1), teacher_NV.gather(1, token_N1)
    p_NV = teacher_NV.exp()
    others_NV = p_NV if wanted.temperature == 1 else (teacher_NV / wanted.temperature).exp_()
    kl_N1 = _mean(p_NV, teacher_NV - student_NV)
    student_entropy_N1, teacher_entropy_N1 = -_mean(student_NV.exp(), student_NV), -_mean(p_NV, teacher_NV)
    named_NX = torch.cat([ids_NK[:, : wanted.teacher_kept], own_NC[:, : wanted.student_kept], token_N1], 1)
    # A mass is a sum, and not 1 less the others: that would be what rounding has left.
    rest_N1 = others_NV.scatter_(1, named_NX, 0.0).sum(-1, keepdim=True).log_()
    return Seen(
        student_logp_N1,
        teacher_logp_N1,
        kl_N1,
        student_entropy_N1,
        teacher_entropy_N1,
        rest_N1,
        top_NK,
        ids_NK,
        teacher_own_NC,
        own_NC,
    )


def _mean(probs_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """Mean of the values [N, 1], in whose place it writes. What has no probability adds nothing, infinite or not."""
    product_NV = values_NV.mul_(probs_NV)
    return product_NV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(-1, keepdim=True)
