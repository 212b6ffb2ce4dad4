"""Values that move: schedules against their formulas, and the controller on simulated curves of acceptance."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_plugin.core.schedules import SHAPES, TargetAcceptance, scheduled

SHARES = st.floats(0, 1)


@given(
    kind=st.sampled_from(sorted(SHAPES)), start=st.floats(0, 1e5), end=st.floats(0, 1e5), hold=st.floats(0, 0.9),
    width=st.floats(0.01, 1), first=SHARES, second=SHARES,
)  # fmt: skip
def test_schedule_is_monotone_between_its_ends(kind, start, end, hold, width, first, second) -> None:
    over = hold + width
    a, b = (scheduled(kind, start, end, hold, over, t) for t in sorted((first, second)))
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= a <= max(start, end) + slack
    assert (b - a) * (end - start) >= -slack * abs(end - start)
    assert scheduled(kind, start, end, hold, over, hold) == start  # exactly
    assert scheduled(kind, start, end, hold, over, over) == pytest.approx(end)
    assert scheduled(kind, start, end, hold, over, over + 0.1) == pytest.approx(end)


def test_schedule_by_hand() -> None:
    """CA-OPD's floor: 0.5 for a tenth of training, then a cosine to 0.25."""
    assert [scheduled("cosine", 0.5, 0.25, 0.1, 1.0, t) for t in (0, 0.1)] == [0.5, 0.5]
    assert scheduled("cosine", 0.5, 0.25, 0.1, 1.0, 0.55) == pytest.approx(0.375)
    assert scheduled("cosine", 0.5, 0.25, 0.1, 1.0, 0.325) == pytest.approx(
        0.25 + 0.25 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert scheduled("linear", 100, 20, 0.2, 0.6, 0.3) == pytest.approx(80)
    assert scheduled("linear", 100, 20, 0.2, 0.6, 0.9) == 20


def controller(**changed: float) -> TargetAcceptance:
    given = {"rate": 0.8, "value": 10.0, "sign": 1, "gain": 1.0, "lowest": 1.0, "highest": 1000.0}
    return TargetAcceptance(**(given | changed))


@pytest.mark.parametrize("start", [1.0, 30.0, 1000.0])
def test_controller_finds_the_k_of_its_rate(start: float) -> None:
    """a(K) = K / (K + 20): 0.8 at K = 80."""
    moved = controller(value=start)
    for _ in range(200):
        moved.observe(moved.value / (moved.value + 20))
    assert moved.value == pytest.approx(80, rel=1e-6)


def test_controller_lowers_a_floor_where_too_little_is_accepted() -> None:
    """a(t) = exp(-3 t): 0.8 at t = -ln(0.8) / 3."""
    moved = controller(value=0.9, sign=-1, lowest=1e-6, highest=1.0)
    for _ in range(300):
        moved.observe(math.exp(-3 * moved.value))
    assert moved.value == pytest.approx(-math.log(0.8) / 3, rel=1e-6)


def test_rounded_k_has_the_rate_on_average() -> None:
    """K = 3 gives 0.75 and K = 4 gives 0.85; a mean of 0.8 takes both in turn. The measurement is noisy."""
    noise = random.Random(0)
    moved, rates = controller(value=50.0), []
    for step in range(4000):
        rate = (
            1 - 0.45 * math.exp(-0.2 * round(moved.value))
            if round(moved.value) > 4
            else 0.45 + 0.1 * round(moved.value)
        )
        rates.append(rate)
        moved.observe(rate + noise.gauss(0, 0.01))
        assert step < 200 or round(moved.value) in (2, 3, 4, 5)
    assert sum(rates[200:]) / len(rates[200:]) == pytest.approx(0.8, abs=0.005)


def test_a_rate_out_of_reach_leaves_the_value_at_its_end_and_it_comes_back() -> None:
    moved = controller(value=10.0)
    for _ in range(100):
        moved.observe(0.1)
    assert moved.value == 1000.0
    moved.observe(0.9)
    assert moved.value < 1000.0
    for _ in range(1000):
        moved.observe(1.0)
    assert moved.value == 1.0


def test_a_step_without_proposals_changes_nothing() -> None:
    moved = controller(value=7.0)
    moved.observe(float("nan"))
    assert moved.value == 7.0


def test_start_outside_the_interval_is_cut() -> None:
    assert controller(value=5000.0).value == 1000.0
