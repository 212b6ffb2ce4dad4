"""The number of drafts that is chosen, in a simulated engine whose costs and acceptance are known."""

from __future__ import annotations

import random

import pytest

from skd_plugin.core.draft_length import DraftLength, StepCost

MOST = 8


def tokens_of_block(rng: random.Random, acceptance: float, drafts: int) -> int:
    """Proposals up to the first that is rejected, in whose place another token stands."""
    for place in range(1, drafts):
        if rng.random() >= acceptance:
            return place
    return drafts


def speed(
    acceptance: float, base: float, slope: float, choose, steps: int, chooser: DraftLength | None = None
) -> float:
    """Tokens a second of an engine with 16 requests that tells `chooser` what it measures, with noise."""
    rng = random.Random(7)
    tokens, seconds, before = 0, 0.0, 0
    for _ in range(steps):
        drafts = choose(16)
        if before:
            blocks = [(before, tokens_of_block(rng, acceptance, before)) for _ in range(16)]
            taken = base + slope * (before + drafts) / 2
            tokens, seconds = tokens + sum(emitted for _, emitted in blocks), seconds + taken
            if chooser is not None:
                chooser.observe_blocks(blocks)
                noise = rng.uniform(0.9, 1.1) * (10 if rng.random() < 0.01 else 1)
                if before == drafts:
                    chooser.observe_step(16, drafts, taken * noise)
        before = drafts
    return tokens / seconds


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.97])
@pytest.mark.parametrize(("base", "slope"), [(0.02, 0.001), (0.02, 0.01), (0.004, 0.01)])
def test_as_fast_as_the_best_fixed_number(acceptance: float, base: float, slope: float) -> None:
    """Within 3 %, with all that is spent on trying."""
    fixed = [speed(acceptance, base, slope, lambda _, g=g: g, 1000) for g in range(1, MOST + 1)]
    chooser = DraftLength(MOST)
    assert speed(acceptance, base, slope, chooser.choose, 1500, chooser) > 0.97 * max(fixed)


def test_follows_an_acceptance_that_changes() -> None:
    chooser = DraftLength(MOST)
    speed(0.2, 0.01, 0.005, chooser.choose, 400, chooser)
    low = [chooser.choose(16) for _ in range(80)]
    speed(0.98, 0.01, 0.005, chooser.choose, 1500, chooser)
    high = [chooser.choose(16) for _ in range(80)]
    assert sorted(low)[40] <= 2 and sorted(high)[40] >= 6


def test_each_size_of_batch_has_its_own_costs() -> None:
    """Drafts that are nearly free for one request, and dear for many."""
    chooser = DraftLength(MOST)
    for _ in range(60):
        for requests, slope in ((1, 1e-4), (64, 5e-2)):
            drafts = chooser.choose(requests)
            chooser.observe_blocks([(drafts, drafts)])
            chooser.observe_step(requests, drafts, 0.01 + slope * drafts)
    assert min(chooser.choose(1) for _ in range(10)) >= MOST - 1


def test_a_batch_that_shrinks_has_the_best_number_at_each_size() -> None:
    """A draft costs next to nothing for one request, and much for many: what is known of many misleads."""
    chooser = DraftLength(MOST)
    for _ in range(40):
        for requests in (128, 90, 50, 30, 16, 9, 5, 2, 1):
            drafts = chooser.choose(requests)
            chooser.observe_blocks([(drafts, drafts), (drafts, (drafts + 1) // 2)] * requests)
            chooser.observe_step(requests, drafts, 0.007 + 0.0007 * drafts + 0.00012 * requests * (1 + drafts))
    assert all(sorted(chooser.choose(requests) for _ in range(9))[4] == MOST for requests in (1, 2, 5, 9))


def test_always_within_its_bounds() -> None:
    chooser = DraftLength(1)
    assert {chooser.choose(requests) for requests in range(1, 300)} == {1}
    chooser = DraftLength(3)
    seen = set()
    for step in range(300):
        seen.add(drafts := chooser.choose(5))
        chooser.observe_blocks([(drafts, 1)])
        chooser.observe_step(5, drafts, 0.01 * (step % 3))
    assert seen == {1, 2, 3}


def test_a_line_needs_two_numbers_of_drafts() -> None:
    cost = StepCost()
    for _ in range(5):
        cost.observe(4, 0.5)
    assert cost.line() is None
    for _ in range(5):
        cost.observe(2, 0.3)
    assert cost.line() == pytest.approx((0.1, 0.1), rel=1e-6)
