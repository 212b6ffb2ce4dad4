"""How many prompts of each task a run of several tasks has."""

from __future__ import annotations

from collections.abc import Sequence


def shares(weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Shares of the tasks, proportional to weight^(1/temperature): 1 keeps the weights, more evens them out.

    With the numbers of prompts as weights this is temperature-scaled mixing (Raffel et al. 2020, arXiv 1910.10683,
    section 3.5.2). A weight of 0 stays a share of 0.
    """
    scaled = [weight ** (1 / temperature) if weight else 0.0 for weight in weights]
    return [value / sum(scaled) for value in scaled]


def parts(total: int, of: Sequence[float]) -> list[int]:
    """`total` cut into whole parts by the shares `of`, the largest remainders rounded up; their sum is `total`."""
    whole = [int(total * share) for share in of]
    by_remainder = sorted(range(len(of)), key=lambda place: whole[place] - total * of[place])
    for place in by_remainder[: total - sum(whole)]:
        whole[place] += 1
    return whole
