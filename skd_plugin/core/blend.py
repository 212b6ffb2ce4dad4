"""The geometric blend of two distributions under a budget of KL, as a law of the next token.

Shapes: N rows, V vocabulary. p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

import torch

HALVINGS = 24  # of the interval of a: it is known to 6e-8, the last digit of a float32


def geometric_blend(p_NV: torch.Tensor, q_NV: torch.Tensor, budget_N: torch.Tensor) -> torch.Tensor:
    """m proportional to q^(1 - a) p^a on the tokens that q has, a in [0, 1] the largest with KL(m||q) <= budget.

    TRB (arXiv 2605.31159). With r = log p - log q, m is q tilted by e^(a r), so that

        KL(m||q) = a E_m[r] - log E_q[e^(a r)],    d KL / d a = a Var_m[r] >= 0,

    and a follows by halving. budget = 0 is q, from KL(p||q) on it is p. A token that p has not is in m for a = 0 only;
    where even leaving such tokens out costs more than the budget, a is 0.

    Args:
        p_NV, q_NV: float32, rows sum to 1; entries may be 0.
        budget_N: float32, nats, >= 0.

    Returns:
        float32 [N, V], rows sum to 1.
    """
    shared_NV = (p_NV > 0) & (q_NV > 0)
    log_q_NV = q_NV.log()
    ratio_NV = torch.where(shared_NV, p_NV.log() - log_q_NV, -torch.inf)

    def tilted(share_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """m [N, V] and KL(m||q) [N] at a = `share` > 0; NaN where the two have no token in common."""
        scores_NV = torch.where(shared_NV, log_q_NV + share_N[:, None] * ratio_NV, -torch.inf)
        log_sum_N = scores_NV.logsumexp(-1)
        blend_NV = (scores_NV - log_sum_N[:, None]).exp()
        mean_ratio_N = torch.where(shared_NV, blend_NV * ratio_NV, 0.0).sum(-1)
        return blend_NV, share_N * mean_ratio_N - log_sum_N

    cost_N = tilted(torch.ones_like(budget_N))[1]
    # The largest a within the budget, and the least beyond; a comparison with NaN is false, which leaves a = 0.
    low_N, high_N = ((cost_N <= budget_N) & (budget_N > 0)).float(), torch.ones_like(budget_N)
    for _ in range(HALVINGS):
        middle_N = (low_N + high_N) / 2
        fits_N = (tilted(middle_N)[1] <= budget_N) & (budget_N > 0)  # rounding is no budget
        low_N, high_N = torch.where(fits_N, middle_N, low_N), torch.where(fits_N, high_N, middle_N)
    return torch.where((low_N > 0)[:, None], tilted(low_N)[0], q_NV)
