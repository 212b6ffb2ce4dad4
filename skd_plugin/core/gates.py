"""Which proposals are kept, and what takes the place of the others.

Shapes: N drafted tokens, V vocabulary. p is the teacher's law and q the student's, each after its own temperature
and nucleus; p1 and q1 are the same at temperature 1, untruncated. A gate looks at one proposal and its prefix, never
at later drafts, so the law of the next token has a closed form. For a gate that keeps exactly the tokens of a set A
(which may depend on the prefix), with S = sum of q over A and replacements from p, it is

    m(v) = 1[v in A] q(v) + (1 - S) p(v).                                                                     (*)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from skd_plugin.core import rng, sampling
from skd_plugin.core.accept import teacher_rank, top_k_gate


@dataclass(frozen=True)
class Proposals:
    """Drafted tokens of requests that share a gate, with everything a gate may look at."""

    draft_N: torch.Tensor  # int64
    teacher_logits_NV: torch.Tensor  # float32, raw
    student_logp_NV: torch.Tensor  # log q1
    position_N: torch.Tensor  # int64
    seed_N: torch.Tensor  # int64
    top_k_N: torch.Tensor  # int64
    threshold_N: torch.Tensor  # float32
    student_temperature_N: torch.Tensor
    student_top_p_N: torch.Tensor
    teacher_temperature_N: torch.Tensor
    teacher_top_p_N: torch.Tensor

    def select(self, rows: torch.Tensor) -> Proposals:
        return Proposals(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    @cached_property
    def rank_N(self) -> torch.Tensor:
        """Rank of the proposal on the teacher's raw logits, 0 the most probable."""
        return teacher_rank(self.teacher_logits_NV, self.draft_N)

    @cached_property
    def teacher_logp_NV(self) -> torch.Tensor:
        return self.teacher_logits_NV.log_softmax(-1)

    @cached_property
    def teacher_probs_NV(self) -> torch.Tensor:
        return sampling.warp(self.teacher_logits_NV, self.teacher_temperature_N, self.teacher_top_p_N)

    @cached_property
    def student_probs_NV(self) -> torch.Tensor:
        return sampling.warp(self.student_logp_NV, self.student_temperature_N, self.student_top_p_N)

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


class Gate(NamedTuple):
    keep: Callable[[Proposals], torch.Tensor]  # bool [N]
    replacement: Callable[[Proposals], torch.Tensor]  # [N, V], what the token in place of a rejected one is drawn from


def from_teacher(proposals: Proposals) -> torch.Tensor:
    return proposals.teacher_probs_NV


def keep_top_k(proposals: Proposals) -> torch.Tensor:
    """A = the K largest raw logits of the teacher: the paper's gate. Law (*). K = V: student, K = 0: teacher."""
    return top_k_gate(proposals.rank_N, proposals.top_k_N)


def keep_top_p(proposals: Proposals) -> torch.Tensor:
    """A = the teacher's nucleus: tokens with less than `threshold` of p1 above them. Law (*).

    threshold above 1 is the student, 0 the teacher. In SKD's released code as an alternative to K.
    """
    own_N1 = proposals.teacher_logp_N[:, None]
    above_N = torch.where(proposals.teacher_logp_NV > own_N1, proposals.teacher_logp_NV.exp(), 0.0).sum(-1)
    return above_N < proposals.threshold_N


def keep_floor(proposals: Proposals) -> torch.Tensor:
    """A = {v : p1(v) >= threshold}, an absolute floor instead of a rank: CA-OPD (arXiv 2609.02401). Law (*).

    threshold = 0 is the student, above 1 the teacher.
    """
    return proposals.teacher_logp_N.exp() >= proposals.threshold_N


def keep_typical(proposals: Proposals) -> torch.Tensor:
    """A = {v : p1(v) >= min(eps, sqrt(eps) exp(-H(p1)))}, eps = threshold: a floor, lower where p1 is flat.

    Typical acceptance of Medusa (arXiv 2401.10774, section 3.3). Law (*). threshold = 0 is the student.
    """
    entropy_N = -(proposals.teacher_logp_NV.exp() * proposals.teacher_logp_NV).sum(-1)
    eps = proposals.threshold_N
    return proposals.teacher_logp_N.exp() >= torch.minimum(eps, eps.sqrt() * torch.exp(-entropy_N))


def keep_confident(proposals: Proposals) -> torch.Tensor:
    """A = {v : q1(v) >= threshold} joined with the teacher's top-K. Law (*).

    Only a token of which the student is unsure is put to the teacher. Above 1 it is `keep_top_k`, at 0 the student.
    """
    return (proposals.student_logp_N.exp() >= proposals.threshold_N) | keep_top_k(proposals)


def keep_by_chance(proposals: Proposals) -> torch.Tensor:
    """Keeps with probability 1 - threshold, whatever the teacher says: m = (1 - t) q + t p.

    The control for a gate's placement of replacements at a matched rate (CA-OPD, Table 2).
    """
    return proposals.coin_N >= proposals.threshold_N


def keep_interpolated(proposals: Proposals) -> torch.Tensor:
    """Keeps with probability min(1, m(v) / q(v)), m = (1 - g) q + g p, g = threshold: the law is exactly m.

    Speculative sampling (arXiv 2211.17192) with m as the target: what is rejected is replaced from (m - q)+, which is
    (p - q)+ for every g > 0, and the rate of rejection is g TV(p, q). g = 0 is the student, 1 the teacher.
    """
    own = proposals.draft_N[:, None]
    p_N = proposals.teacher_probs_NV.gather(1, own).squeeze(1)
    q_N = proposals.student_probs_NV.gather(1, own).squeeze(1)
    return proposals.coin_N * q_N < (1 - proposals.threshold_N) * q_N + proposals.threshold_N * p_N


def from_residual(proposals: Proposals) -> torch.Tensor:
    residual_NV = (proposals.teacher_probs_NV - proposals.student_probs_NV).clamp_min(0)
    equal = residual_NV.sum(-1, keepdim=True) <= 0  # p = q: nothing is rejected but by rounding
    return torch.where(equal, proposals.teacher_probs_NV, residual_NV)


GATES: dict[str, Gate] = {
    "top_k": Gate(keep_top_k, from_teacher),
    "top_p": Gate(keep_top_p, from_teacher),
    "floor": Gate(keep_floor, from_teacher),
    "typical": Gate(keep_typical, from_teacher),
    "confident": Gate(keep_confident, from_teacher),
    "chance": Gate(keep_by_chance, from_teacher),
    "interpolated": Gate(keep_interpolated, from_residual),
}
