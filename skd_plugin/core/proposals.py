"""Drafted tokens, and everything that a gate may look at.

Shapes: N drafted tokens of all requests in one row (request by request), V vocabulary. p is the teacher's distribution
and q the student's, each after its own temperature and nucleus; p1 and q1 are the same at temperature 1, untruncated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from skd_plugin.core import rng
from skd_plugin.core.blend import geometric_blend
from skd_plugin.core.logit_rows import LogitRows, in_parts
from skd_plugin.core.sampling import SettingRows


@dataclass(frozen=True)
class Proposals:
    """Drafted tokens with everything a gate may look at. Distributions are read when they are asked for."""

    draft_N: torch.Tensor  # int64
    teacher: LogitRows  # [N], raw
    student: LogitRows  # [N], raw, or log q1
    position_N: torch.Tensor  # int64, index of the token in its sequence (prompt included)
    seed_N: torch.Tensor  # int64, of the request's random stream
    prompt_len_N: torch.Tensor  # int64
    settings: SettingRows  # [N]

    def select(self, rows: torch.Tensor | slice) -> Proposals:
        return Proposals(
            draft_N=self.draft_N[rows],
            teacher=self.teacher.select(rows),
            student=self.student.select(rows),
            position_N=self.position_N[rows],
            seed_N=self.seed_N[rows],
            prompt_len_N=self.prompt_len_N[rows],
            settings=self.settings.select(rows),
        )

    def some(self, rows: torch.Tensor | None) -> tuple[torch.Tensor | slice, Proposals]:
        """Some of the proposals, with the rows that they are.

        Args:
            rows: int64, those that are wanted; None for all.
        """
        return (slice(None), self) if rows is None else (rows, self.select(rows))

    def in_parts(self, rows: torch.Tensor | None) -> Iterator[tuple[torch.Tensor | slice, Proposals]]:
        """The same, as many at a time as may be read at once."""
        parts = in_parts(len(self.draft_N) if rows is None else len(rows), self.teacher.values_SV)
        for part in parts:
            own = part if rows is None else rows[part]
            yield own, self if rows is None and len(parts) == 1 else self.select(own)

    @cached_property
    def top_k_N(self) -> torch.Tensor:
        """K at the place of each proposal, int64."""
        settings = self.settings
        if settings.values("top_k_decay_len") == {0}:
            return settings.top_k
        return decayed_top_k(settings.top_k, self.position_N - self.prompt_len_N, settings.top_k_decay_len)

    @cached_property
    def rank_N(self) -> torch.Tensor:
        """Rank of the proposal on the teacher's raw logits, 0 the most probable."""
        return self.teacher.rank(self.draft_N)

    @cached_property
    def teacher_logits_NV(self) -> torch.Tensor:
        """float32, raw."""
        return self.teacher.read()

    @cached_property
    def student_logp_NV(self) -> torch.Tensor:
        """log q1."""
        return self.student.read().log_softmax(-1)

    @cached_property
    def teacher_logp_NV(self) -> torch.Tensor:
        """log p1."""
        return self.teacher_logits_NV.log_softmax(-1)

    @cached_property
    def teacher_probs_NV(self) -> torch.Tensor:
        return self.teacher.warp(self.settings, "teacher")

    @cached_property
    def student_probs_NV(self) -> torch.Tensor:
        return self.student.warp(self.settings, "student")

    @cached_property
    def blend_NV(self) -> torch.Tensor:
        """The geometric blend of the two within a budget of `threshold` nats."""
        return geometric_blend(self.teacher_probs_NV, self.student_probs_NV, self.settings.threshold)

    @property
    def teacher_logp_N(self) -> torch.Tensor:
        """log p1 of the proposal."""
        return self.teacher_logp_NV.gather(1, self.draft_N[:, None]).squeeze(1)

    @property
    def student_logp_N(self) -> torch.Tensor:
        """log q1 of the proposal."""
        return self.student_logp_NV.gather(1, self.draft_N[:, None]).squeeze(1)

    @property
    def coin_N(self) -> torch.Tensor:
        """Uniform numbers for gates that toss a coin; a stream of their own."""
        return rng.uniform(self.seed_N, self.position_N, rng.COIN)


def decayed_top_k(top_k_N: torch.Tensor, age_N: torch.Tensor, decay_len_N: torch.Tensor) -> torch.Tensor:
    """K at the response position t = age: max(1, K - floor(K t / L)), L = decay_len; K itself for L = 0.

    SKD's release lowers K by ceil(K / L) every max(floor(K / L), 1) verified blocks; a block has a varying number of
    tokens. Here the unit is the token, K falls evenly from K at t = 0, and from t = L on it is 1.
    """
    lowered_N = (top_k_N - top_k_N * age_N // decay_len_N.clamp_min(1)).clamp_min(1)
    return torch.where(decay_len_N > 0, lowered_N, top_k_N)
