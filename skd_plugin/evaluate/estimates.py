"""Estimators over held-out prompts, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Values:
    """One numerator and one denominator a prompt; their estimate is the sum of the ones over the sum of the others.

    With denominators of 1 it is a mean over prompts; with numbers of tokens, a mean over tokens.
    """

    numerator: Sequence[float]
    denominator: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.numerator)


@dataclass(frozen=True)
class Point:
    """A value of all responses together, which is no mean over prompts and so has no interval here."""

    mean: float
    count: int

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Estimate:
    n: int  # prompts
    mean: float | None  # None where it does not exist
    low: float | None  # ends of the interval; None where there is none
    high: float | None


class Bootstrap:
    """Percentile bootstrap (Efron 1979) over the prompts of one task.

    Every estimate is computed on the same resamples, so that the difference of two students on the same prompts is a
    paired one. Shapes: B resamples, n prompts.
    """

    def __init__(self, n: int, seed: int, resamples: int = RESAMPLES, level: float = LEVEL) -> None:
        # How often a resample holds each prompt; all that a sum over it depends on.
        self._counts_Bn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
        self._ends = 50 * (1 - level), 50 * (1 + level)

    def estimate(self, values: Values | Point) -> Estimate:
        if isinstance(values, Point):
            return Estimate(len(values), _known(values.mean), None, None)
        return self._estimate(len(values), _ratio(values), self._replicates(values))

    def difference(self, values: Values | Point, minus: Values | Point) -> Estimate:
        """`values` less `minus`, of the same prompts in the same order.

        Raises:
            ValueError: the two are not of as many prompts.
        """
        if len(values) != len(minus):
            raise ValueError(f"a paired difference needs the same prompts; got {len(values)} and {len(minus)}")
        if isinstance(values, Point) or isinstance(minus, Point):
            return Estimate(len(values), _known(_mean(values) - _mean(minus)), None, None)
        spread_B = self._replicates(values) - self._replicates(minus)
        return self._estimate(len(values), _ratio(values) - _ratio(minus), spread_B)

    def _replicates(self, values: Values) -> np.ndarray:
        numerator_n, denominator_n = _arrays(values)
        with np.errstate(invalid="ignore"):  # 0 / 0: a resample in which nothing was counted
            return (self._counts_Bn @ numerator_n) / (self._counts_Bn @ denominator_n)

    def _estimate(self, n: int, mean: float, replicates_B: np.ndarray) -> Estimate:
        known_B = replicates_B[np.isfinite(replicates_B)]
        if not len(known_B):
            return Estimate(n, _known(mean), None, None)
        low, high = np.percentile(known_B, self._ends)
        return Estimate(n, _known(mean), float(low), float(high))


def _arrays(values: Values) -> tuple[np.ndarray, np.ndarray]:
    numerator_n = np.asarray(values.numerator, dtype=float)
    return numerator_n, np.ones(len(values)) if values.denominator is None else np.asarray(values.denominator, float)


def _ratio(values: Values) -> float:
    numerator_n, denominator_n = _arrays(values)
    total = denominator_n.sum()
    return float(numerator_n.sum() / total) if total else float("nan")


def _mean(values: Values | Point) -> float:
    return values.mean if isinstance(values, Point) else _ratio(values)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def best_of(scores: Sequence[float], k: int) -> float:
    """Expected best score of k samples, without bias from n >= k of them.

    The mean of the maximum over all subsets of k: with sorted scores s_1 <= ... <= s_n it is
    sum_i s_i C(i - 1, k - 1) / C(n, k). For scores of 0 and 1, c of them 1, that is pass@k = 1 - C(n - c, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ValueError: k is not within 1..n.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"the best of {k} needs at least {max(k, 1)} samples; there are {n}")
    total = comb(n, k)
    return sum(score * (comb(place, k - 1) / total) for place, score in enumerate(sorted(scores)))


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams per n-gram, over all responses together.

    NaN where no response has n tokens.
    """
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")
