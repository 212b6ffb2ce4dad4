"""Distillation losses, one value a token. p is the teacher, q the student, in nats, in float32.

Shapes: N trained tokens, V vocabulary, K teacher entries kept a token, C = K + 2 categories: the teacher's top-K, the
emitted token where it is not among them, and all other tokens as one. A loss never reduces over tokens: OpenRLHF's
`aggregate_loss` does, with the token count of the whole optimizer step.

Each divergence is written once, over any categories: the C of a rollout, or the whole vocabulary. Joining categories
cannot raise a divergence (data-processing inequality), so the value on C categories is a lower bound of the value on
the vocabulary, never negative, and zero iff the C probabilities agree. (`adaptive_kl` is not negative and zero iff
they agree, but no such bound: its weight depends on the categories.)

A category that is empty (-inf) where the other distribution's mass does not ask for it adds 0. Where a divergence is
infinite by definition, it is +inf, and its gradient is finite: a clamp or a weight of 0 makes it harmless. Nothing
but logits of NaN or +inf, or of nothing but -inf, gives a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from skd_plugin.core.targets import REGIONS, RegionTest, Targets
from skd_plugin.core.trace import NOTHING

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (log p [N, C], log q [N, C]) -> [N]
# (student's logits [N, V] of any float type, with gradient; targets) -> [N], float32 (float64 for float64 logits)
TokenLoss = Callable[[torch.Tensor, Targets], torch.Tensor]

ADAPTIVE_HEAD_MASS = 0.5  # mu of the adaptive KL, as in its paper


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p||q) = sum p (log p - log q). The loss of SKD (arXiv 2410.11325, section 3) and of Hinton et al. 2015.

    +inf where q is 0 and p is not.
    """
    p = log_p.exp()
    # A category without mass adds 0, whatever the other distribution says.
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(q||p) = sum q (log q - log p). MiniLLM (arXiv 2306.08543).

    +inf, without a gradient, where p is 0 and q is not.
    """
    q = log_q.exp()
    has_mass, nowhere = q > 0, log_p == -torch.inf
    # An infinite ratio is also q's gradient, and 0 (of a clamp) x inf is NaN; so it stays out and inf is put last.
    value = (q * torch.where(has_mass & ~nowhere, log_q - log_p, 0.0)).sum(-1)
    return value.masked_fill((has_mass & nowhere).any(-1), torch.inf)


def symmetric_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """(KL(p||q) + KL(q||p)) / 2. Half of Jeffreys' divergence."""
    return 0.5 * (forward_kl(log_p, log_q) + reverse_kl(log_p, log_q))


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q, 0 < beta < 1. GKD (arXiv 2306.13649, eq. 1).

    At most the entropy of (beta, 1 - beta); divided by beta it tends to KL(p||q) for beta -> 0, divided by 1 - beta to
    KL(q||p) for beta -> 1.
    """
    log_m = _log_mixture(log_p, log_q, beta, 1 - beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q), 0 <= alpha < 1; alpha = 0 is the forward KL. DistiLLM (arXiv 2402.03898).

    At most -log alpha.
    """
    if alpha == 0:
        return forward_kl(log_p, log_q)
    return forward_kl(log_p, _log_mixture(log_p, log_q, alpha, 1 - alpha))


def skew_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(q || alpha q + (1 - alpha) p), 0 <= alpha < 1; alpha = 0 is the reverse KL. DistiLLM (arXiv 2402.03898).

    At most -log alpha.
    """
    if alpha == 0:
        return reverse_kl(log_p, log_q)
    return forward_kl(log_q, _log_mixture(log_p, log_q, 1 - alpha, alpha))


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum |p - q| / 2, in [0, 1], no unit. One minus it is the acceptance rate of speculative decoding."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def adaptive_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """w KL(p||q) + (1 - w) KL(q||p), w the share of |p - q| that lies in p's head. AKL (arXiv 2404.02657).

    The head: the fewest most probable categories that hold half of p. w is a constant to the gradient.
    """
    p, q = log_p.exp(), log_q.exp()
    sorted_p, order = p.sort(dim=-1, descending=True)
    head = torch.zeros_like(p).scatter(-1, order, (sorted_p.cumsum(-1) - sorted_p < ADAPTIVE_HEAD_MASS).to(p.dtype))
    gap = (p - q).abs().detach()
    head_share = (gap * head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    head_share = head_share.clamp_max(1.0)  # rounding
    forward, reverse = head_share * forward_kl(log_p, log_q), (1 - head_share) * reverse_kl(log_p, log_q)
    # An infinite KL without a share adds 0.
    return torch.where(head_share == 0, 0.0, forward) + torch.where(head_share == 1, 0.0, reverse)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, p_share: float, q_share: float) -> torch.Tensor:
    """log of the mixture without leaving log space."""
    scaled_log_p = (log_p + math.log(p_share)).clamp_min_(torch.finfo(log_p.dtype).min)
    # Where both are empty, -inf on both sides has a gradient that is NaN; with a finite number on the side that needs
    # none (p), q's is 0. It changes no sum with anything else.
    return torch.logaddexp(scaled_log_p, log_q + math.log(q_share))


def cross_entropy(student_logits_NV: torch.Tensor, targets: Targets) -> torch.Tensor:
    """-log q(emitted token): SFT, and SeqKD (arXiv 1606.07947, eq. 5) on the teacher's text. A hard label has no
    temperature, so q is at temperature 1. +inf where q is 0 there.
    """
    logits_NV = _divided(student_logits_NV, 1.0)
    return logits_NV.logsumexp(-1) - logits_NV.gather(1, targets.token_N[:, None]).squeeze(1)


@dataclass(frozen=True)
class Loss:
    """Everything that is known of a loss. It is either a divergence of two distributions, or a loss of hard labels."""

    words: str  # what it teaches, for people
    # (log p [N, C], log q [N, C], its parameters by name) -> [N]. Both at the temperature of the recipe.
    divergence: Callable[..., torch.Tensor] | None = None
    parameters: tuple[str, ...] = ()  # its options in a recipe, names of `PARAMETERS`
    of_labels: TokenLoss | None = None  # without a temperature

    @property
    def has_temperature(self) -> bool:
        return self.of_labels is None


# Options of a recipe that are a parameter of some losses -> what they are.
PARAMETERS = {"beta": "the teacher's share of the mixture", "alpha": "share of the first distribution"}

LOSSES: dict[str, Loss] = {
    "forward_kl": Loss("forces q to cover p", forward_kl),
    "reverse_kl": Loss("lets q settle on a part of p", reverse_kl),
    "symmetric_kl": Loss("the mean of both", symmetric_kl),
    "jsd": Loss("between the two, bounded", jsd, ("beta",)),
    "skew_forward_kl": Loss("a forward KL that stays finite", skew_forward_kl, ("alpha",)),
    "skew_reverse_kl": Loss("a reverse KL that stays finite", skew_reverse_kl, ("alpha",)),
    "total_variation": Loss("1 - the acceptance rate of speculative decoding", total_variation),
    "adaptive_kl": Loss("weights the two KLs by where p and q differ", adaptive_kl),
    "cross_entropy": Loss("the emitted token is the label", of_labels=cross_entropy),
}


def make_divergence(kind: str, **options: float) -> Divergence:
    """The divergence of a recipe with its parameters bound: chosen once, so that a training step has no branch.

    Args:
        options: `PARAMETERS` by name; those that the divergence does not have are ignored.

    Raises:
        KeyError: no loss of that name.
        ValueError: it is no divergence.
    """
    loss = LOSSES[kind]
    if loss.divergence is None:
        raise ValueError(f"{kind} is a loss of the emitted token and no divergence of two distributions")
    return partial(loss.divergence, **{name: options[name] for name in loss.parameters})


def categories(
    student_logits_NV: torch.Tensor, targets: Targets, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and log q, both at `temperature`, of the teacher's top-K, the emitted token and the rest: [N, K + 2] each.

    Exact, though few log p are known: the engine sums p^(1 / tau) over the rest. (The mass of the tail minus that of
    the token would be rounding, where the token is nearly all of the tail.) Where the token is among the K, or nothing
    is left beside it, its category or the rest is empty on both sides: -inf, with no gradient; and so is an entry that
    names no token.
    """
    logits_NV = _divided(student_logits_NV, temperature)
    entries_NK, vocab = targets.teacher_ids_NK, logits_NV.shape[1]
    named_NK = entries_NK != NOTHING
    outside_N = (entries_NK != targets.token_N[:, None]).all(1)
    no_rest_N = named_NK.sum(1) + outside_N == vocab
    empty_NC = torch.cat([~named_NK, ~outside_N[:, None], no_rest_N[:, None]], 1)
    ids_NK = torch.where(named_NK, entries_NK, entries_NK[:, :1])  # a place that is named already
    log_q = _student_categories(logits_NV, ids_NK, targets.token_N).masked_fill(empty_NC, -torch.inf)
    log_p = _teacher_categories(targets, temperature).to(log_q.dtype).masked_fill(empty_NC, -torch.inf)
    return log_p - log_p.logsumexp(-1, keepdim=True), log_q


def _divided(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """At least float32; no copy of [N, V] where there is nothing to do."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV if temperature == 1 else logits_NV / temperature


def _student_categories(logits_NV: torch.Tensor, ids_NK: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    """log q of the K tokens, the emitted token and everything else [N, K + 2].

    The rest is a log-sum-exp over the other logits, not log(1 - head): it keeps its precision and its gradient where
    the student has next to no mass there.
    """
    named_NC = torch.cat([ids_NK, token_N[:, None]], 1)
    lowest = torch.finfo(logits_NV.dtype).min  # not -inf: a sum of nothing but -inf has a gradient that is NaN
    rest_N1 = logits_NV.scatter(1, named_NC, lowest).logsumexp(-1, keepdim=True)
    rest_N1 = rest_N1.masked_fill(rest_N1 < lowest / 2, -torch.inf)
    return torch.cat([logits_NV.gather(1, named_NC), rest_N1], 1) - logits_NV.logsumexp(-1, keepdim=True)


def _teacher_categories(targets: Targets, temperature: float) -> torch.Tensor:
    """The same of p^(1 / tau), without its common factor."""
    named_NC = torch.cat([targets.teacher_logp_NK, targets.token_teacher_logp_N[:, None]], 1) / temperature
    return torch.cat([named_NC, targets.teacher_rest_N[:, None]], 1)


def top_k_loss(divergence: Divergence, temperature: float = 1.0) -> TokenLoss:
    """D(p_tau || q_tau) with both models at temperature tau (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Hinton et al. multiply it by tau^2, because its gradient falls as 1 / tau^2 beside a hard-label term of another
    scale. Here it is left as it is: the value stays a divergence in nats.
    """

    def loss(student_logits_NV: torch.Tensor, targets: Targets) -> torch.Tensor:
        return divergence(*categories(student_logits_NV, targets, temperature))

    return loss


def whole_vocabulary_loss(divergence: Divergence, temperature: float = 1.0) -> TokenLoss:
    """`top_k_loss` where everything is known of the teacher: `teacher_logp_NK` is log p of all V tokens, by their ids,
    and the student's logits are log q.
    """

    def loss(student_logits_NV: torch.Tensor, targets: Targets) -> torch.Tensor:
        return divergence(soften(targets.teacher_logp_NK, temperature), soften(student_logits_NV, temperature))

    return loss


def soften(log_p_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """log of p^(1 / tau), normalised again; no copy of [N, V] where there is nothing to do."""
    return log_p_NV if temperature == 1 else (log_p_NV / temperature).log_softmax(-1)


def by_region(elsewhere: TokenLoss, regions: Sequence[tuple[RegionTest, TokenLoss]]) -> TokenLoss:
    """A loss for each region of tokens; a token of several regions has that of the first, one of none `elsewhere`."""
    losses = [loss for _, loss in regions] + [elsewhere]

    def loss(student_logits_NV: torch.Tensor, targets: Targets) -> torch.Tensor:
        which_N = torch.full_like(targets.token_N, len(regions))
        for index, (contains, _) in reversed(list(enumerate(regions))):
            which_N = torch.where(contains(targets), index, which_N)
        rows = [(which_N == index).nonzero().squeeze(1) for index in range(len(losses))]
        parts = [part(student_logits_NV[own], targets.select(own)) for part, own in zip(losses, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    return loss


def clamped(inner: TokenLoss, limit: float) -> TokenLoss:
    """At most `limit` a token. A token above it has no gradient: it counts in the value, and teaches nothing."""
    return lambda student_logits_NV, targets: inner(student_logits_NV, targets).clamp_max(limit)


def weighted(inner: TokenLoss, accepted_weight: float, replaced_weight: float, handed_weight: float) -> TokenLoss:
    """A constant factor for each origin of a token."""

    def loss(student_logits_NV: torch.Tensor, targets: Targets) -> torch.Tensor:
        values_N = inner(student_logits_NV, targets)
        weights_N = torch.where(targets.replaced_N, replaced_weight, accepted_weight).to(values_N.dtype)
        weights_N = weights_N.masked_fill(targets.handed_N, handed_weight)
        return torch.where(weights_N == 0, 0.0, values_N * weights_N)  # 0 of an infinite one, too

    return loss


def on_common_vocabulary(inner: TokenLoss, vocab: int) -> TokenLoss:
    """The student restricted to its first `vocab` tokens: rows after them, which pad a model to a round number of
    rows or are unknown to the teacher, have no part in the value and no gradient.
    """
    return lambda student_logits_NV, targets: inner(student_logits_NV[..., :vocab], targets)


@dataclass(frozen=True)
class RegionSettings:
    """Another loss for some tokens."""

    where: str  # a name of `REGIONS`
    kind: str  # a name of `LOSSES`
    threshold: float | None = None  # of the region, if it has one


@dataclass(frozen=True)
class LossSettings:
    """The loss of a token in a recipe; docs/losses.md explains each option."""

    kind: str  # a name of `LOSSES`
    beta: float  # a parameter, see `PARAMETERS`
    alpha: float  # likewise
    replaced_kind: str | None = None  # region `replaced` for short, before all others; None: no such region
    regions: tuple[RegionSettings, ...] = ()
    temperature: float = 1.0  # of both models in a divergence
    accepted_weight: float = 1.0
    replaced_weight: float = 1.0
    handed_weight: float | None = None  # None: replaced_weight
    clamp: float | None = None  # nats; applied before the weights. None: no limit

    @property
    def all_regions(self) -> tuple[RegionSettings, ...]:
        replaced = () if self.replaced_kind is None else (RegionSettings("replaced", self.replaced_kind),)
        return (*replaced, *self.regions)


def make_token_loss(
    settings: LossSettings,
    *,
    vocab: int | None = None,
    against: Callable[[Divergence, float], TokenLoss] = top_k_loss,
) -> TokenLoss:
    """The loss of a recipe, composed once, so that a training step has no branch.

    Args:
        vocab: tokens that both models have, if the student has rows beyond them. None: all rows of the student.
        against: `top_k_loss` or `whole_vocabulary_loss`, by what is known of the teacher.

    Raises:
        KeyError: no loss of that name.
    """

    def named(kind: str) -> TokenLoss:
        of_labels = LOSSES[kind].of_labels
        if of_labels is not None:
            return of_labels
        return against(make_divergence(kind, beta=settings.beta, alpha=settings.alpha), settings.temperature)

    loss = named(settings.kind)
    if settings.all_regions:
        regions = [(REGIONS[own.where].test(own.threshold), named(own.kind)) for own in settings.all_regions]
        loss = by_region(loss, regions)
    if settings.clamp is not None:
        loss = clamped(loss, settings.clamp)
    handed_weight = settings.replaced_weight if settings.handed_weight is None else settings.handed_weight
    weights = settings.accepted_weight, settings.replaced_weight, handed_weight
    if weights != (1.0, 1.0, 1.0):
        loss = weighted(loss, *weights)
    return loss if vocab is None else on_common_vocabulary(loss, vocab)
