"""What a rollout knows of the tokens to be learned, and regions of them that may have a loss of their own.

Shapes: N trained tokens, K teacher entries kept a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch

from skd_plugin.core.trace import Source, Trace


@dataclass(frozen=True)
class Targets:
    """What a rollout knows of N tokens to be learned. Log-probabilities are the teacher's, in nats.

    `teacher_rest_N` is the one entry that depends on the temperature tau of the loss: the engine that records it must
    have been started with the same `loss_temperature`.
    """

    # int64, the teacher's most probable tokens and, where the recipe says so, the student's; NOTHING: no entry
    teacher_ids_NK: torch.Tensor
    teacher_logp_NK: torch.Tensor  # float32, their log p at temperature 1 over the whole vocabulary
    teacher_rest_N: torch.Tensor  # float32, log of the sum of p^(1 / tau) over all but the K and the emitted token
    token_N: torch.Tensor  # int64, the emitted token
    token_teacher_logp_N: torch.Tensor  # float32, its log p at temperature 1
    # float32, log q of it by the student that sampled, at temperature 1; NaN where that was not drafted
    token_student_logp_N: torch.Tensor
    teacher_entropy_N: torch.Tensor  # float32, H(p) at temperature 1, nats
    source_N: torch.Tensor  # uint8, codes of core.trace.Source

    @classmethod
    def of(cls, trace: Trace, device: torch.device) -> Targets:
        return cls(
            teacher_ids_NK=trace.teacher_topk_ids.to(device=device, dtype=torch.int64),
            teacher_logp_NK=trace.teacher_topk_logp.to(device),
            teacher_rest_N=trace.teacher_rest_tempered.to(device),
            token_N=trace.response_ids.to(device=device, dtype=torch.int64),
            token_teacher_logp_N=trace.teacher_logp.to(device),
            token_student_logp_N=trace.student_logp.to(device),
            teacher_entropy_N=trace.teacher_entropy.to(device),
            source_N=trace.source.to(device),
        )

    def select(self, rows: torch.Tensor | slice) -> Targets:
        return Targets(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def replaced_N(self) -> torch.Tensor:
        """bool: the gate rejected the student's proposal here, or handed over to the teacher before; everything else
        counts as accepted.
        """
        return (self.source_N == Source.REPLACED) | (self.source_N == Source.FLAGGED) | self.handed_N

    @property
    def handed_N(self) -> torch.Tensor:
        """bool: inside a leg of the teacher, after its first token."""
        return self.source_N == Source.HANDED


RegionTest = Callable[[Targets], torch.Tensor]  # -> bool [N]


def replaced(targets: Targets) -> torch.Tensor:
    """The gate rejected the student's proposal, or handed over: CA-OPD's loss by source (arXiv 2609.02401)."""
    return targets.replaced_N


def handed(targets: Targets) -> torch.Tensor:
    """In a leg of the teacher, after its first token (Relay-OPD, arXiv 2607.26057)."""
    return targets.handed_N


def distrusted(targets: Targets, threshold: float) -> torch.Tensor:
    """min(p(y) / q(y), 1) < threshold, y the emitted token: the student was far surer of it than the teacher.

    The outliers of TrOPD (arXiv 2606.01249), which learns them by the forward KL and all others by the reverse KL. Not
    where q is unknown.
    """
    return (targets.token_teacher_logp_N - targets.token_student_logp_N).clamp_max(0).exp() < threshold


def flat(targets: Targets, threshold: float) -> torch.Tensor:
    """H(p) > threshold: several tokens would do, which a reverse KL forgets. EOPD (arXiv 2603.07079)."""
    return targets.teacher_entropy_N > threshold


@dataclass(frozen=True)
class Region:
    """Everything that is known of a region. It is told by the rollout alone, so it is a constant to the gradient."""

    words: str  # which tokens are in it, for people; {threshold} is filled in
    contains: Callable[..., torch.Tensor]  # (targets, its threshold if it has one) -> bool [N]
    has_threshold: bool = False
    of_whole: bool = False  # it takes the teacher's whole distribution while sampling

    def test(self, threshold: float | None) -> RegionTest:
        return partial(self.contains, threshold=threshold) if self.has_threshold else self.contains


REGIONS: dict[str, Region] = {
    "replaced": Region("tokens that the gate replaced", replaced),
    "handed": Region("the teacher's legs, after their first tokens", handed),
    "distrusted": Region("tokens with min(p/q, 1) below {threshold}", distrusted, has_threshold=True),
    "flat": Region(
        "places where the teacher's entropy is above {threshold} nats", flat, has_threshold=True, of_whole=True
    ),
}
