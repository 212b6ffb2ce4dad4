"""Distillation losses, one value a token. p is the teacher, q the student, in nats, in float32.

Shapes: N trained tokens, V vocabulary, K teacher entries kept a token, C = K + 1 categories: the teacher's top-K and
one tail that holds all other tokens. A loss never reduces over tokens: the host's `aggregate_loss` does, with the
token count of the whole optimizer step.

Each divergence is written once, over any categories: the C of a rollout, or the whole vocabulary. Joining categories
cannot raise a divergence (data-processing inequality), so the value on C categories is a lower bound of the value on
the vocabulary, never negative, and zero iff the C probabilities agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (log p [N, C], log q [N, C]) -> [N]
TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # see `top_k_loss`

ADAPTIVE_HEAD_MASS = 0.5  # mu of the adaptive KL, as in its paper


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p||q) = sum p (log p - log q). The loss of SKD (arXiv 2410.11325, section 3) and of Hinton et al. 2015."""
    p = log_p.exp()
    # A category without mass adds 0, whatever the other distribution says.
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(q||p) = sum q (log q - log p). MiniLLM (arXiv 2306.08543)."""
    return forward_kl(log_q, log_p)


def symmetric_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """(KL(p||q) + KL(q||p)) / 2. Half of Jeffreys' divergence."""
    return 0.5 * (forward_kl(log_p, log_q) + reverse_kl(log_p, log_q))


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q, 0 < beta < 1. GKD (arXiv 2306.13649, eq. 1).

    At most the entropy of (beta, 1 - beta); divided by beta it tends to KL(p||q) for beta -> 0, divided by 1 - beta to
    KL(q||p) for beta -> 1.
    """
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q), 0 <= alpha < 1; alpha = 0 is the forward KL. DistiLLM (arXiv 2402.03898)."""
    return forward_kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(q || alpha q + (1 - alpha) p), 0 <= alpha < 1; alpha = 0 is the reverse KL. DistiLLM (arXiv 2402.03898)."""
    return forward_kl(log_q, _log_mixture(log_q, log_p, alpha))


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
    return head_share * forward_kl(log_p, log_q) + (1 - head_share) * reverse_kl(log_p, log_q)


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, weight_a: float) -> torch.Tensor:
    """log(w a + (1 - w) b) without leaving log space."""
    if weight_a == 0:
        return log_b
    log_weights = torch.tensor([weight_a, 1 - weight_a], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_a + log_weights[0], log_b + log_weights[1])


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
}


def make_divergence(kind: str, *, beta: float, alpha: float) -> Divergence:
    """The divergence of a recipe with its parameter bound: chosen once, so that a training step has no branch.

    Raises:
        KeyError: no divergence of that name.
    """
    parameters = {"jsd": {"beta": beta}, "skew_forward_kl": {"alpha": alpha}, "skew_reverse_kl": {"alpha": alpha}}
    return partial(DIVERGENCES[kind], **parameters.get(kind, {}))


def student_categories(student_logits_NV: torch.Tensor, teacher_ids_NK: torch.Tensor) -> torch.Tensor:
    """log q of the teacher's K tokens and of everything else as one category: float32 [N, K + 1].

    The tail is a log-sum-exp over the logits outside the head, not log(1 - head): it keeps its precision and its
    gradient where the student has next to no mass there. For K = V there is no tail, and the result is [N, K].
    """
    logits_NV = student_logits_NV.float()
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    head_NK = logits_NV.gather(1, teacher_ids_NK) - total_N1
    if teacher_ids_NK.shape[1] >= logits_NV.shape[1]:
        return head_NK
    tail_N1 = logits_NV.scatter(1, teacher_ids_NK, float("-inf")).logsumexp(-1, keepdim=True) - total_N1
    return torch.cat([head_NK, tail_N1], dim=1)


def top_k_loss(divergence: Divergence) -> TokenLoss:
    """A divergence as a loss of the student's logits against what a rollout keeps of the teacher.

    The loss takes student_logits_NV (any float type, with gradient), teacher_ids_NK (int64) and teacher_logp_NC
    (log p of the K tokens over the whole vocabulary, not renormalised, and the log mass of all others as the last
    column). It returns float32 [N]. Padded teacher or student vocabularies need no care: a padding row is one more
    token of the tail.
    """

    def loss(
        student_logits_NV: torch.Tensor, teacher_ids_NK: torch.Tensor, teacher_logp_NC: torch.Tensor
    ) -> torch.Tensor:
        log_q = student_categories(student_logits_NV, teacher_ids_NK)
        return divergence(teacher_logp_NC[:, : log_q.shape[1]].float(), log_q)

    return loss
