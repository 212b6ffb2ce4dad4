"""A mean over seeds, a difference between two methods, and how small a one a number of seeds can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm, t

LEVEL = 0.05
QUANTILES = 2000


@dataclass(frozen=True)
class Interval:
    """Student's t interval at 95 %; with one value there is none, and `half` is None."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(fmean(values), None, len(values))
        half = float(t.ppf(1 - LEVEL / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        return cls(fmean(values), half, len(values))


def p_value(differences: Sequence[float]) -> float | None:
    """Of the paired t-test, two sides, that the mean difference is 0; None with one pair, or without any spread."""
    if len(differences) < 2 or not (spread := stdev(differences)):
        return None
    statistic = fmean(differences) * len(differences) ** 0.5 / spread
    return 2 * float(t.sf(abs(statistic), len(differences) - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted for all that are asked at once (Holm 1979): the smallest times their number, the next times one less,
    and none below the one before it. What has no value is not asked.
    """
    asked = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(asked):
        highest = max(highest, min(1.0, p * (len(asked) - rank)))
        adjusted[place] = highest
    return adjusted


def detectable(spread: float, pairs: int, comparisons: int = 1, power: float = 0.8) -> float:
    """The mean difference that a paired t-test finds with probability `power`, at 5 % over `comparisons` (Bonferroni,
    which is Holm's first step); inf with fewer than two pairs.

    Args:
        spread: standard deviation of the paired differences, as a pilot has shown it.
    """
    if pairs < 2:
        return math.inf
    if spread == 0:
        return 0.0
    limit = float(t.ppf(1 - LEVEL / comparisons / 2, pairs - 1))

    # The t of a shift: a normal over the root of a chi-squared, here at its quantiles; scipy's is NaN for few pairs.
    spreads = np.sqrt(chi2.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, pairs - 1) / (pairs - 1))

    def missing(shift: float) -> float:
        found = norm.sf(limit * spreads - shift) + norm.cdf(-limit * spreads - shift)
        return float(found.mean()) - power

    return float(brentq(missing, 0.0, 10.0 * (limit + 1))) * spread / pairs**0.5
