"""Which proposals are kept, and what the token in place of another is drawn from.

Shapes: N drafted tokens of all requests in one row (request by request), V vocabulary.
p is the teacher's distribution and q the student's, each after its own temperature and nucleus; p1 and q1 are the
same at temperature 1, untruncated. A gate looks at one proposal and its prefix, never at later drafts, so the
distribution m of the next token has a closed form. For a gate that keeps exactly the tokens of a set A (which may
depend on the prefix), with S = sum of q over A and replacements from p, it is

    m(v) = 1[v in A] q(v) + (1 - S) p(v).                                                                     (*)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from skd_plugin.core.logit_rows import rank
from skd_plugin.core.proposals import Proposals
from skd_plugin.core.top_k import top_k


def from_teacher(proposals: Proposals) -> torch.Tensor:
    """The whole warped p, as in the paper. At a teacher temperature of 0 it is the argmax (CA-OPD, Table 2)."""
    return proposals.teacher_probs_NV


@dataclass(frozen=True)
class Threshold:
    """What is known of a gate's number."""

    sign: int  # a higher one accepts more (1) or less (-1)
    is_probability: bool = False  # else it is any number from 0 on
    # Highest that a controller goes to, by the size of the vocabulary: above it nothing changes any more.
    highest: Callable[[int], float] = lambda vocab_size: 1.0


@dataclass(frozen=True)
class Gate:
    """Everything that is known of a gate."""

    keep: Callable[[Proposals], torch.Tensor]  # bool [N]
    words: str  # when a proposal stays, for people; {top_k} and {threshold} are filled in
    has_top_k: bool = False  # it looks at K
    decays: bool = False  # K may fall along the response (top_k_decay_len)
    threshold: Threshold | None = None
    # What the token in place of a rejected one is drawn from, [N, V], not normalised; and its name in a formula.
    replacement: Callable[[Proposals], torch.Tensor] = from_teacher
    replaced_from: str = "p"
    again: Callable[[Proposals], torch.Tensor] | None = None  # the student's second answer, where it has any mass
    confidence: str | None = None  # it is `confident` in a recipe, with this measure of the student's confidence
    released: bool = False  # no name in a recipe: SKD's released code, chosen by reference_compat

    @property
    def replaces_from_teacher(self) -> bool:
        """Rejected proposals give way to a draw from p, so p may as well be its argmax."""
        return self.replacement is from_teacher

    @property
    def keeps_without_logits(self) -> bool:
        """What it keeps depends on the rank and on chance alone."""
        return self.keep in (keep_top_k, keep_by_chance)

    @property
    def can_flag(self) -> bool:
        """A rejected proposal may be left in the text (write_back: false)."""
        return self.again is None


def keep_top_k(proposals: Proposals) -> torch.Tensor:
    """A = the K largest raw logits of the teacher: SKD (arXiv 2410.11325, Algorithm 1). Distribution (*).

    Temperature would not change the rank, nucleus truncation would. K = V is the student, K = 0 the teacher.
    """
    return proposals.rank_N < proposals.top_k_N


def keep_top_p(proposals: Proposals) -> torch.Tensor:
    """A = the teacher's nucleus: tokens with less than `threshold` of p1 above them. Distribution (*).

    threshold above 1 is the student, 0 the teacher. In SKD's released code as an alternative to K.
    """
    own_N1 = proposals.teacher_logp_N[:, None]
    above_N = torch.where(proposals.teacher_logp_NV > own_N1, proposals.teacher_logp_NV.exp(), 0.0).sum(-1)
    return above_N < proposals.settings.threshold


def keep_floor(proposals: Proposals) -> torch.Tensor:
    """A = {v : p1(v) >= threshold}, an absolute floor instead of a rank: CA-OPD (arXiv 2609.02401). Distribution (*).

    threshold = 0 is the student, above 1 the teacher.
    """
    return proposals.teacher_logp_N.exp() >= proposals.settings.threshold


def keep_typical(proposals: Proposals) -> torch.Tensor:
    """A = {v : p1(v) >= min(eps, sqrt(eps) exp(-H(p1)))}, eps = threshold: a floor, lower where p1 is flat.

    Typical acceptance of Medusa (arXiv 2401.10774, section 3.3). Distribution (*). threshold = 0 is the student.
    """
    entropy_N = -(proposals.teacher_logp_NV.exp() * proposals.teacher_logp_NV).sum(-1)
    eps = proposals.settings.threshold
    return proposals.teacher_logp_N.exp() >= torch.minimum(eps, eps.sqrt() * torch.exp(-entropy_N))


def keep_confident(proposals: Proposals) -> torch.Tensor:
    """A = {v : q1(v) >= threshold} joined with the teacher's top-K. Distribution (*).

    Only a token of which the student is unsure is put to the teacher. Above 1 it is `keep_top_k`, at 0 the student.
    """
    return (proposals.student_logp_N.exp() >= proposals.settings.threshold) | keep_top_k(proposals)


def keep_where_margin(proposals: Proposals) -> torch.Tensor:
    """Keeps all where the two largest q1 differ by >= threshold, else the teacher's top-K.

    The sureness is of the prefix, not of the token: m = q where sure, m_K elsewhere. Above 1 it is `keep_top_k`, at 0
    the student.
    """
    first_N, second_N = top_k(proposals.student_logp_NV, 2)[0].exp().unbind(-1)
    return (first_N - second_N >= proposals.settings.threshold) | keep_top_k(proposals)


def keep_where_certain(proposals: Proposals) -> torch.Tensor:
    """Keeps all where H(q1) <= threshold (nats), else the teacher's top-K: m = q where sure, m_K elsewhere.

    From ln V on it is the student; at 0 it is `keep_top_k`, unless q1 is a point mass.
    """
    logp_NV = proposals.student_logp_NV
    entropy_N = -torch.special.xlogy(logp_NV.exp(), logp_NV.exp()).sum(-1)
    return (entropy_N <= proposals.settings.threshold) | keep_top_k(proposals)


def keep_where_foreseen(proposals: Proposals) -> torch.Tensor:
    """Keeps all where argmax p1 is among the K largest q1, else only argmax p1: m = q where foreseen, m_1 elsewhere.

    A prefix after which the student has no thought of what the teacher would write is one that went wrong: the trigger
    of Relay-OPD (arXiv 2607.26057), which looks at a list of words only. K = V is the student, K = 0 is `top_k` of 1.
    """
    first_N = proposals.teacher_logits_NV.argmax(-1)
    foreseen_N = rank(proposals.student_logp_NV, first_N) < proposals.top_k_N
    return foreseen_N | (proposals.draft_N == first_N)


def from_student_inside(proposals: Proposals) -> torch.Tensor:
    """q on the teacher's top-K, for a student that is asked a second time.

    With A the top-K and S = sum of q over A, a second draw from q / S on A after a rejection gives
        m(v) = 1[v in A] q(v) (1 + (1 - S) / S) = 1[v in A] q(v) / S
    where S > 0, and p where S = 0: the student, held to what the teacher finds plausible. K = V is the student.
    """
    inside_NV = in_top_k(proposals.teacher_logits_NV, proposals.top_k_N, max(proposals.settings.values("top_k")))
    return proposals.student_probs_NV * inside_NV


def in_top_k(logits_NV: torch.Tensor, top_k_N: torch.Tensor, highest: int) -> torch.Tensor:
    """Which tokens are the K largest of their row, each row with its own K: bool [N, V].

    Args:
        highest: no K is above it.
    """
    largest_NK = top_k(logits_NV, min(max(highest, 1), logits_NV.shape[1]))[0]
    last_N1 = largest_NK.gather(1, (top_k_N - 1).clamp(0, largest_NK.shape[1] - 1)[:, None])
    above_NV, tied_NV = logits_NV > last_N1, logits_NV == last_N1
    free_N1 = top_k_N[:, None] - above_NV.sum(-1, keepdim=True)  # places for those that are as large as the last
    return above_NV | (tied_NV & (tied_NV.cumsum(-1, dtype=torch.int32) <= free_N1))


def keep_top_k_of_nucleus(proposals: Proposals) -> torch.Tensor:
    """A = the K largest of the teacher's logits after its temperature and nucleus: SKD's released code.

    Distribution (*). The release ranks what the nucleus has left, so that with top-p 0.5 its K = 25 rarely decides
    anything. Its ranks after the nucleus are ties of probability zero; here they are never kept.
    `skd.rollout.reference_compat`.
    """
    inside_N = proposals.teacher_probs_NV.gather(1, proposals.draft_N[:, None]).squeeze(1) > 0
    return inside_N & keep_top_k(proposals)


def keep_by_chance(proposals: Proposals) -> torch.Tensor:
    """Keeps with probability 1 - threshold, whatever the teacher says: m = (1 - t) q + t p.

    The control for a gate's placement of replacements at a matched rate (CA-OPD, Table 2): the threshold is the
    share that the gate rejects, its `1 - skd/accept_rate`, or a controller holds that rate.
    """
    return proposals.coin_N >= proposals.settings.threshold


def keep_interpolated(proposals: Proposals) -> torch.Tensor:
    """Keeps with probability min(1, m(v) / q(v)), m = (1 - g) q + g p, g = threshold: the distribution is exactly m.

    Speculative sampling (arXiv 2211.17192) with m as the target: what is rejected is replaced from (m - q)+, which is
    (p - q)+ for every g > 0, and the rate of rejection is g TV(p, q). g = 0 is the student, 1 the teacher.
    """
    own = proposals.draft_N[:, None]
    p_N = proposals.teacher_probs_NV.gather(1, own).squeeze(1)
    q_N = proposals.student_probs_NV.gather(1, own).squeeze(1)
    return proposals.coin_N * q_N < (1 - proposals.settings.threshold) * q_N + proposals.settings.threshold * p_N


def from_residual(proposals: Proposals) -> torch.Tensor:
    residual_NV = (proposals.teacher_probs_NV - proposals.student_probs_NV).clamp_min(0)
    equal = residual_NV.sum(-1, keepdim=True) <= 0  # p = q: nothing is rejected but by rounding
    return torch.where(equal, proposals.teacher_probs_NV, residual_NV)


def keep_blended(proposals: Proposals) -> torch.Tensor:
    """Keeps with probability min(1, m(v) / q(v)), m the geometric blend: the distribution is exactly m.

    TRB (arXiv 2605.31159): m is proportional to q^(1 - a) p^a, a at each place the largest in [0, 1] for which
    KL(m||q) <= threshold, nats. By speculative sampling with m as the target: what is rejected is replaced from
    (m - q)+. threshold = 0 is the student; where it is KL(p||q) or more, m is p.
    """
    own = proposals.draft_N[:, None]
    m_N, q_N = (probs_NV.gather(1, own).squeeze(1) for probs_NV in (proposals.blend_NV, proposals.student_probs_NV))
    return proposals.coin_N * q_N < m_N


def from_blend_residual(proposals: Proposals) -> torch.Tensor:
    residual_NV = (proposals.blend_NV - proposals.student_probs_NV).clamp_min(0)
    equal = residual_NV.sum(-1, keepdim=True) <= 0  # m = q: nothing is rejected but by rounding
    return torch.where(equal, proposals.blend_NV, residual_NV)


GATES: dict[str, Gate] = {
    "top_k": Gate(keep_top_k, "it is among the teacher's {top_k} most probable", has_top_k=True, decays=True),
    "ask_again": Gate(
        keep_top_k,
        "it is among the teacher's {top_k} most probable, or else is drawn again from them",
        has_top_k=True,
        decays=True,
        again=from_student_inside,
    ),
    "top_p": Gate(keep_top_p, "it lies in the teacher's nucleus of mass {threshold}", threshold=Threshold(1)),
    "floor": Gate(keep_floor, "the teacher gives it {threshold} or more", threshold=Threshold(-1)),
    "typical": Gate(
        keep_typical,
        "the teacher gives it more than a floor ({threshold}) that sinks with the teacher's entropy",
        threshold=Threshold(-1),
    ),
    "confident": Gate(
        keep_confident,
        "the student is sure of it (q of {threshold} or more), or it is among the teacher's {top_k} first",
        has_top_k=True,
        threshold=Threshold(-1),
        confidence="probability",
    ),
    "confident_margin": Gate(
        keep_where_margin,
        "the student is sure of it (the two largest q are {threshold} or more apart), or it is among the teacher's "
        "{top_k} first",
        has_top_k=True,
        threshold=Threshold(-1),
        confidence="margin",
    ),
    "confident_entropy": Gate(
        keep_where_certain,
        "the student is sure of it (an entropy of {threshold} nats or less), or it is among the teacher's {top_k} "
        "first",
        has_top_k=True,
        threshold=Threshold(1, highest=math.log),
        confidence="entropy",
    ),
    "foreseen": Gate(
        keep_where_foreseen,
        "the student has the teacher's first choice among its own {top_k} first, or has proposed it",
        has_top_k=True,
        decays=True,
    ),
    "chance": Gate(
        keep_by_chance,
        "a coin says so, whatever the models think: it is rejected with probability {threshold}",
        threshold=Threshold(-1, is_probability=True),
    ),
    "interpolated": Gate(
        keep_interpolated,
        "the next token's distribution stays (1 - t) q + t p, t = {threshold}",
        threshold=Threshold(-1, is_probability=True),
        replacement=from_residual,
        replaced_from="(p - q)+",
    ),
    "blended": Gate(
        keep_blended,
        "the next token's distribution stays q^(1-a) p^a, a as large as {threshold} nats from q allow",
        # KL(p||q) has no bound; a student that far from its teacher has learned nothing yet.
        threshold=Threshold(-1, highest=lambda vocab_size: 10 * math.log(vocab_size)),
        replacement=from_blend_residual,
        replaced_from="(m - q)+",
    ),
    "top_k_of_nucleus": Gate(
        keep_top_k_of_nucleus,
        "it is among the teacher's {top_k} most probable after temperature and top-p",
        has_top_k=True,
        decays=True,
        released=True,
    ),
}

CONFIDENT = "confident"  # the one name that a recipe knows for several gates, by a measure of confidence
# Measure of the student's confidence -> the gate that `confident` is with it.
CONFIDENCES = {gate.confidence: name for name, gate in GATES.items() if gate.confidence is not None}
(RELEASED,) = (name for name, gate in GATES.items() if gate.released)
# The names of `GATES` that a recipe knows.
GATE_OPTIONS = tuple(
    dict.fromkeys(CONFIDENT if gate.confidence else name for name, gate in GATES.items() if not gate.released)
)


def gate_of_option(option: str, confidence: str) -> str:
    """The gate, a name of `GATES`, that a recipe means by its options `gate` and `confidence`."""
    return CONFIDENCES[confidence] if option == CONFIDENT else option
