"""Token weights: each weighting against its formula, and what the floor promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.core.token_weights import WEIGHTINGS, make_weigher
from skd_plugin.core.trace import NOTHING, Trace
from tests.traces import trace_of

VOCAB = 50


def make_trace(entropy: list[float], kl: list[float], rank: list[int]) -> Trace:
    known = {"draft_rank": torch.tensor(rank, dtype=torch.int32), "kl": torch.tensor(kl)}
    return trace_of(torch.zeros(len(kl)), teacher_entropy=torch.tensor(entropy), **known)


def test_weightings_are_their_formulas() -> None:
    entropy, kl, rank = [0.0, 1.5, math.log(VOCAB)], [0.0, 0.7, 40.0], [0, 6, VOCAB - 1]
    trace = make_trace(entropy, kl, rank)
    needs = {
        "none": [1.0, 1.0, 1.0],
        "confidence": [1.0, 1 - 1.5 / math.log(50), 0.0],
        "divergence": [0.0, 1 - math.exp(-0.7), 1.0],
        "early": [1.0, 2 / 3, 1 / 3],
        "rank": [0.0, math.log(7) / math.log(50), 1.0],
    }
    assert set(needs) == set(WEIGHTINGS)
    for by, need in needs.items():
        for floor in (0.0, 0.25):
            expected = torch.tensor([floor + (1 - floor) * r for r in need])
            torch.testing.assert_close(make_weigher(by, floor, VOCAB)(trace), expected, atol=1e-6, rtol=1e-5)


def test_nothing_known_of_the_student_is_full_weight() -> None:
    trace = make_trace([1.0, 1.0], [math.nan, 0.0], [NOTHING, 0])
    for by in ("divergence", "rank"):
        assert make_weigher(by, 0.1, VOCAB)(trace).tolist() == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(("by", "falls"), [("confidence", True), ("divergence", False), ("rank", False)])
def test_direction(by: str, falls: bool) -> None:
    """An uncertain teacher counts less; models that differ, and a proposal of low rank, count more."""
    steps = [0.1 * n for n in range(20)]
    weights = make_weigher(by, 0.0, VOCAB)(make_trace(steps, steps, list(range(20))))
    assert ((weights.diff() < 0) if falls else (weights.diff() > 0)).all()


@pytest.mark.parametrize("by", WEIGHTINGS)
@settings(max_examples=50, deadline=None)
@given(floor=st.floats(0, 0.99), vocab=st.integers(2, 10**6), seed=st.integers(0, 10**6), count=st.integers(0, 9))
def test_no_token_counts_less_than_the_floor_times_another(by, floor, vocab, seed, count) -> None:
    """Before and after the common factor that gives the weights of a step mean 1."""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(count, generator=generator) * (math.log(vocab) + 1e-4)  # rounding may exceed log V
    kl = torch.randn(count, generator=generator).exp() - 1e-6  # rounding may be negative
    rank = torch.randint(-1, vocab, (count,), generator=generator)
    weights = make_weigher(by, floor, vocab)(make_trace(entropy.tolist(), kl.tolist(), rank.tolist()))
    assert weights.shape == (count,) and weights.dtype == torch.float32
    assert ((weights >= floor - 1e-6) & (weights <= 1 + 1e-6)).all()
    if count and weights.sum() > 0:
        final = weights * count / weights.sum()
        assert final.mean() == pytest.approx(1, abs=1e-5)
        assert final.min() >= floor * final.max() * (1 - 1e-5)


def test_only_a_prefix_is_learned() -> None:
    trace = make_trace([0.1, 2.0, 3.0], [0.5, math.nan, 0.1], [3, NOTHING, 0])
    for by in WEIGHTINGS:
        whole = make_weigher(by, 0.2, VOCAB)(trace)
        for count in (1, 2, 3, 9):
            kept = make_weigher(by, 0.2, VOCAB, count)(trace)
            assert torch.equal(kept[:count], whole[:count]) and not kept[count:].any()


def test_a_slice_has_the_weights_of_its_tokens() -> None:
    """A token's weight depends on nothing but itself, so cutting a response changes no weight; but that of a place."""
    trace = make_trace([0.1, 2.0, 3.0], [0.5, math.nan, 0.1], [3, NOTHING, 0])
    for by in WEIGHTINGS.keys() - {"early"}:
        whole = make_weigher(by, 0.2, VOCAB)(trace)
        torch.testing.assert_close(make_weigher(by, 0.2, VOCAB)(trace.slice(1, 3)), whole[1:], rtol=0, atol=0)


def test_unknown_weighting() -> None:
    with pytest.raises(KeyError):
        make_weigher("loss", 0.1, VOCAB)
