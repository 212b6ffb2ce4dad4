"""A mean over seeds and its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t


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
        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        return cls(fmean(values), half, len(values))
