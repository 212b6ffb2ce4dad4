"""Temperature, nucleus and inverse-CDF sampling, each row with its own settings.

Shapes: N rows, V vocabulary entries.
"""

from __future__ import annotations

import torch


def warp(logits_NV: torch.Tensor, temperature_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """Probabilities after temperature and nucleus (top-p) truncation.

    A temperature of 0 puts all mass on the largest logit (the lowest id among equals). The nucleus is the smallest
    set of most probable tokens whose mass reaches top_p (Holtzman et al. 2020); the token that crosses it is kept.

    Args:
        logits_NV: [N, V], any float type.
        temperature_N: float [N], >= 0.
        top_p_N: float [N], in (0, 1].

    Returns:
        float32 [N, V]; rows sum to 1.
    """
    logits_NV = logits_NV.float()
    greedy_N = temperature_N <= 0
    probs_NV = (logits_NV / torch.where(greedy_N, 1.0, temperature_N)[:, None]).softmax(-1)
    if bool((top_p_N < 1).any()):
        probs_NV = _nucleus(probs_NV, top_p_N)
    if bool(greedy_N.any()):
        one_hot = torch.zeros_like(probs_NV).scatter_(1, logits_NV.argmax(-1, keepdim=True), 1.0)
        probs_NV = torch.where(greedy_N[:, None], one_hot, probs_NV)
    return probs_NV


def _nucleus(probs_NV: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    mass_before_NV = sorted_NV.cumsum(-1, dtype=torch.float64) - sorted_NV
    keep_NV = (mass_before_NV < top_p_N[:, None]) | (top_p_N >= 1)[:, None]
    kept_NV = torch.zeros_like(probs_NV).scatter_(1, order_NV, sorted_NV * keep_NV)
    return kept_NV / kept_NV.sum(-1, keepdim=True)


def draw(probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """One token a row by inversion of the cumulative distribution; never a token of probability zero.

    Args:
        probs_NV: float [N, V], non-negative; rows need not be normalised.
        uniform_N: float64 [N], in (0, 1].

    Returns:
        int64 [N].
    """
    cdf_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    target_N1 = uniform_N[:, None] * cdf_NV[:, -1:]
    # The first entry that reaches the target: it has risen above its neighbour, so its probability is not zero.
    return torch.searchsorted(cdf_NV, target_N1, right=False).squeeze(1)
