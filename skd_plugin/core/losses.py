"""Distillation losses, one value a token. p is the teacher, q the student, in nats, in float32.

Shapes: N trained tokens, K teacher entries kept a token, V student vocabulary. A loss never reduces over tokens: the
host's `aggregate_loss` does, with the token count of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def log_tail(head_logp_NK: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the head's probabilities): the mass of all tokens outside the head.

    A head that holds all mass up to rounding gets a tail of one float32 epsilon (log = -15.9), so that its logarithm
    and gradient stay finite.

    Returns:
        float32 [N].
    """
    head_N = head_logp_NK.exp().sum(-1)
    return torch.log((1.0 - head_N).clamp_min(torch.finfo(torch.float32).eps))


def student_buckets(student_logits_NV: torch.Tensor, teacher_ids_NK: torch.Tensor) -> torch.Tensor:
    """log q of the teacher's K tokens, and of everything else as one bucket: [N, K + 1].

    The tail is a log-sum-exp over the logits outside the head, not 1 - head: it keeps full precision and a gradient
    when the student has next to no mass there.
    """
    logits_NV = student_logits_NV.float()
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    head_NK = logits_NV.gather(1, teacher_ids_NK) - total_N1
    if teacher_ids_NK.shape[1] >= logits_NV.shape[1]:
        tail_N1 = torch.full_like(total_N1, float("-inf"))
    else:
        tail_N1 = logits_NV.scatter(1, teacher_ids_NK, float("-inf")).logsumexp(-1, keepdim=True) - total_N1
    return torch.cat([head_NK, tail_N1], dim=1)


def _teacher_buckets(teacher_logp_NK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    if teacher_logp_NK.shape[1] >= vocab_size:
        tail_N = torch.full_like(teacher_logp_NK[:, 0], float("-inf"))
    else:
        tail_N = log_tail(teacher_logp_NK)
    return torch.cat([teacher_logp_NK, tail_N[:, None]], dim=1)


def _divergence(p_logp_NC: torch.Tensor, q_logp_NC: torch.Tensor) -> torch.Tensor:
    """KL(p||q) over the categories of the last axis. A category that p gives no mass adds 0, whatever q says."""
    p_NC = p_logp_NC.exp()
    log_ratio_NC = torch.where(p_NC > 0, p_logp_NC - q_logp_NC, 0.0)
    return (p_NC * log_ratio_NC).sum(-1)


def forward_kl(
    student_logits_NV: torch.Tensor, teacher_ids_NK: torch.Tensor, teacher_logp_NK: torch.Tensor
) -> torch.Tensor:
    """Forward KL, KL(p||q) = sum p (log p - log q), on K + 1 categories: the teacher's top-K and one tail.

    The loss of SKD (arXiv 2410.11325, section 3) and of Hinton et al. 2015. Joining the tail into one category cannot
    raise the divergence (log-sum inequality), so this is a lower bound of the full-vocabulary value, never negative,
    zero iff the K + 1 probabilities agree, and equal to the full-vocabulary value for K = V.

    Args:
        student_logits_NV: [N, V], any float type, with gradient.
        teacher_ids_NK: int64 [N, K].
        teacher_logp_NK: [N, K], log p over the whole vocabulary (not renormalised over the K).

    Returns:
        float32 [N], nats, >= 0 up to rounding.
    """
    teacher_NC = _teacher_buckets(teacher_logp_NK.float(), student_logits_NV.shape[1])
    return _divergence(teacher_NC, student_buckets(student_logits_NV, teacher_ids_NK))


def reverse_kl(
    student_logits_NV: torch.Tensor, teacher_ids_NK: torch.Tensor, teacher_logp_NK: torch.Tensor
) -> torch.Tensor:
    """Reverse KL, KL(q||p) = sum q (log q - log p), on the same K + 1 categories; used by MiniLLM (arXiv 2306.08543).

    The tail category is what keeps it honest: without it the student could lower the loss by moving mass outside the
    teacher's top-K. Shapes and units as `forward_kl`.
    """
    teacher_NC = _teacher_buckets(teacher_logp_NK.float(), student_logits_NV.shape[1])
    return _divergence(student_buckets(student_logits_NV, teacher_ids_NK), teacher_NC)


LOSSES: dict[str, TokenLoss] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
