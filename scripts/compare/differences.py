"""Methods against the reference method, seed by seed, and what the seeds of a plan can show."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import stdev

from collect import Row, chosen
from interval import Interval, detectable, holm, p_value
from plan import Plan

KEYS = ("score", "kl")


@dataclass(frozen=True)
class Difference:
    method: str
    key: str  # of KEYS
    values: list[float]  # the method's minus the reference's, a pair a seed
    p: float | None = None  # of the paired t-test, corrected for all differences of the cell (Holm)

    @property
    def interval(self) -> Interval:
        return Interval.of(self.values)

    @property
    def is_clear(self) -> bool:
        return self.p is not None and self.p < 0.05


def differences(plan: Plan, table: list[Row], cell: str) -> list[Difference]:
    """Of every method with a seed in common with the reference, score and KL."""
    against = {row["seed"]: row for row in chosen(table, cell, plan.comparison.against)}
    found = []
    for method in plan.comparison.methods:
        pairs = [(row, against[row["seed"]]) for row in chosen(table, cell, method) if row["seed"] in against]
        if pairs and method != plan.comparison.against:
            found += [Difference(method, key, [own[key] - other[key] for own, other in pairs]) for key in KEYS]
    corrected = holm([p_value(one.values) for one in found])
    return [Difference(one.method, one.key, one.values, p) for one, p in zip(found, corrected, strict=True)]


def smallest(plan: Plan, table: list[Row], cell: str, key: str) -> float | None:
    """The difference to the reference that the plan's seeds find four times in five, after the correction; from the
    median spread over the methods of `table`, a pilot or the runs themselves. None: too few runs to say.
    """
    spreads = sorted(
        stdev(one.values) for one in differences(plan, table, cell) if one.key == key and len(one.values) > 1
    )
    if not spreads:
        return None
    comparisons = len(KEYS) * (len(plan.comparison.methods) - 1)
    return detectable(spreads[len(spreads) // 2], len(plan.seeds), comparisons)
