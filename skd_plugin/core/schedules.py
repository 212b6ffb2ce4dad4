"""Values that move while training goes on: by a schedule, or after a measured rate of acceptance.

Progress is the share of training that is done, 0 at the first step and 1 after the last. A schedule is a pure
function of it. A controller has one number of state, which a checkpoint can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Share of the way from the first to the last value after the share u of the moving part.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}


def scheduled(kind: str, start: float, end: float, hold: float, over: float, progress: float) -> float:
    """start + (end - start) shape(u), u = (progress - hold) / (over - hold) cut to [0, 1].

    CA-OPD (arXiv 2609.02401) anneals its floor from 0.5 to 0.25 by a cosine after a hold of 0.1.

    Args:
        kind: a name of `SHAPES`.
        hold: share of training spent at `start`.
        over: share of training at which `end` is reached; above `hold`.
    """
    share = SHAPES[kind](min(max((progress - hold) / (over - hold), 0.0), 1.0))
    return (1 - share) * start + share * end  # exact at both ends


@dataclass
class TargetAcceptance:
    """Moves a gate's value until the measured rate of acceptance is `rate`.

    After each step, x <- clip(x exp(sign gain (rate - measured)), lowest, highest). Let a(x) be the rate that the
    value x gives; it rises with x for sign = 1 (K), falls for sign = -1 (a floor). In ln x the error shrinks by the
    factor 1 - gain |da / d ln x| a step near the fixed point a(x) = rate, so it converges where that slope is below
    2 / gain. A rate that no x of the interval reaches leaves x at its near end, from which it comes back at once,
    because nothing accumulates. The value is real; a K that is rounded for use alternates between the two whole
    numbers whose rates enclose `rate`, in the proportion that makes their mean `rate`.
    """

    rate: float
    value: float
    sign: int
    gain: float
    lowest: float
    highest: float

    def __post_init__(self) -> None:
        self.value = min(max(self.value, self.lowest), self.highest)

    def observe(self, measured: float) -> None:
        """`measured` is the rate of acceptance of a step; NaN, of a step without proposals, changes nothing."""
        if not math.isnan(measured):
            moved = self.value * math.exp(self.sign * self.gain * (self.rate - measured))
            self.value = min(max(moved, self.lowest), self.highest)
