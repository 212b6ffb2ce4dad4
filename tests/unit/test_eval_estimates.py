"""Estimators of `skd eval` against enumeration and scipy; intervals against the truth they should hold."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.stats

from skd_plugin.evaluate.estimates import Bootstrap, Estimate, Point, Values, best_of, distinct
from skd_plugin.evaluate.speculation import Blocks, count_blocks

# --- the best of k ---


@pytest.mark.parametrize("scores", [(0, 0, 1, 0, 1), (1, 1, 1), (0, 0, 0, 0), (0.2, 0.9, 0.2, 0.5, 0.1, 0.4)])
def test_the_best_of_k_is_the_mean_over_all_subsets(scores):
    for k in range(1, len(scores) + 1):
        expected = np.mean([max(subset) for subset in combinations(scores, k)])
        assert best_of(scores, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(16, 3, 4), (200, 1, 100), (1000, 7, 10), (5, 5, 1)])
def test_of_right_and_wrong_it_is_chens_estimator(n, right, k):
    """1 - prod_{i = n - c + 1}^{n} (1 - k / i), the stable form of the paper."""
    expected = 1 - np.prod(1 - k / np.arange(n - right + 1, n + 1)) if n - right >= k else 1.0
    assert best_of([1.0] * right + [0.0] * (n - right), k) == pytest.approx(expected, rel=1e-9)


def test_it_has_no_bias():
    """The mean over many draws of 6 samples is the chance that 4 samples hold a right one."""
    rng = np.random.default_rng(0)
    estimates = [best_of(draw, 4) for draw in (rng.random((20_000, 6)) < 0.2).astype(float)]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - (1 - 0.8**4)) < 4 * error


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="there are 3"):
        best_of([0, 1, 1], k)


# --- distinct-n ---


def test_distinct_n_counts_over_all_responses():
    responses = [[1, 2, 1, 2], [1, 2], [3]]
    assert distinct(responses, 1) == 3 / 7
    assert distinct(responses, 2) == 2 / 4  # 12, 21, 12 and 12: no bigram across responses
    assert distinct(responses, 3) == 2 / 2
    assert np.isnan(distinct(responses, 5))


# --- bootstrap ---


def test_the_interval_is_scipys():
    values = np.random.default_rng(1).exponential(size=60)
    estimate = Bootstrap(60, seed=0, resamples=20_000).estimate(Values(values))
    known = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert estimate.n == 60 and estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((known.low, known.high), abs=0.01)


def test_a_ratio_resamples_both_of_its_parts():
    rng = np.random.default_rng(3)
    sums, tokens = rng.gamma(2.0, size=50), rng.integers(1, 40, size=50)
    estimate = Bootstrap(50, seed=0, resamples=20_000).estimate(Values(sums, tokens))
    known = scipy.stats.bootstrap(
        (sums, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    assert estimate.mean == pytest.approx(sums.sum() / tokens.sum())
    assert (estimate.low, estimate.high) == pytest.approx((known.low, known.high), abs=0.003)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        estimate = Bootstrap(100, seed, resamples=400).estimate(Values(rng.random(100) < 0.3))
        held += estimate.low <= 0.3 <= estimate.high
    assert scipy.stats.binomtest(held, 400, 0.94).pvalue > 1e-3  # of 100 coins it is a little under 95 %


def test_a_difference_is_paired():
    """Two students that differ by the same amount on every prompt differ by it without any doubt."""
    values = np.random.default_rng(6).random(40)
    bootstrap = Bootstrap(40, seed=0)
    found = bootstrap.difference(Values(values + 0.1), Values(values))
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    own = bootstrap.estimate(Values(values))
    assert own.high - own.low > 0.1
    with pytest.raises(ValueError, match="same prompts; got 40 and 39"):
        bootstrap.difference(Values(values), Values(values[1:]))


def test_the_same_seed_gives_the_same_interval():
    values = Values(np.random.default_rng(7).random(30))
    assert Bootstrap(30, 1).estimate(values) == Bootstrap(30, 1).estimate(values) != Bootstrap(30, 2).estimate(values)


def test_what_does_not_exist_is_none():
    bootstrap = Bootstrap(2, 0)
    assert bootstrap.estimate(Values([0, 0], [0, 0])) == Estimate(2, None, None, None)
    assert bootstrap.estimate(Point(float("nan"), 2)) == Estimate(2, None, None, None)
    assert bootstrap.estimate(Point(0.5, 2)) == Estimate(2, 0.5, None, None)
    assert bootstrap.difference(Point(0.5, 2), Point(0.25, 2)) == Estimate(2, 0.25, None, None)
    one_known = bootstrap.estimate(Values([0, 3], [0, 2]))  # a resample that holds the first prompt twice has nothing
    assert (one_known.mean, one_known.low, one_known.high) == (1.5, 1.5, 1.5)


# --- blocks of speculative sampling ---


def blocks(kept: str, draft_len: int) -> Blocks:
    return count_blocks([letter == "s" for letter in kept], draft_len)


@pytest.mark.parametrize(
    ("kept", "draft_len", "expected"),
    [
        ("ttt", 2, Blocks(3, 0)),
        ("st", 2, Blocks(1, 1)),
        ("sss", 2, Blocks(1, 2)),  # two kept and the bonus, whatever had been proposed in its place
        ("sst", 2, Blocks(1, 2)),
        ("ss", 2, Blocks(1, 2)),  # the response ends inside the block
        ("sssst", 2, Blocks(2, 3)),
        ("ssss", 8, Blocks(1, 4)),
        ("", 2, Blocks(0, 0)),
    ],
)
def test_a_trace_is_cut_into_blocks(kept, draft_len, expected):
    assert blocks(kept, draft_len) == expected


def test_independent_acceptance_gives_leviathans_expectation():
    """(1 - a^(L + 1)) / (1 - a) tokens a forward: arXiv 2211.17192, equation 1."""
    kept, length = np.random.default_rng(8).random(400_000) < 0.7, 4
    found = count_blocks(kept.tolist(), length)
    assert len(kept) / found.forwards == pytest.approx((1 - 0.7 ** (length + 1)) / 0.3, rel=0.01)
