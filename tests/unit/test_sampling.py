"""Warping against a slow numpy reference, and the distribution of a draw."""

from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from skd_plugin.core import rng, sampling

P_VALUE = 1e-4


def slow_warp(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """One row, token by token, in float64."""
    if temperature == 0:
        probs = np.zeros(len(logits))
        probs[int(np.argmax(logits))] = 1.0
        return probs
    probs = np.exp((logits - logits.max()) / temperature)
    probs /= probs.sum()
    kept, mass = [], 0.0
    for token in sorted(range(len(probs)), key=lambda v: (-probs[v], v)):
        if mass >= top_p and top_p < 1:
            break
        kept.append(token)
        mass += probs[token]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / mass
    return result


def warp_one(logits: list[float], temperature: float, top_p: float) -> torch.Tensor:
    return sampling.warp(torch.tensor([logits]), torch.tensor([temperature]), torch.tensor([top_p]))[0]


def test_warp_matches_the_reference_in_a_mixed_batch():
    generator = torch.Generator().manual_seed(0)
    settings_ = [(t, p) for t in (0.0, 0.3, 1.0, 2.5) for p in (0.05, 0.5, 0.9, 1.0)]
    logits = torch.randn(len(settings_), 40, generator=generator) * 3
    temperature, top_p = (torch.tensor(column) for column in zip(*settings_, strict=True))
    expected = np.stack([slow_warp(row.double().numpy(), t, p) for row, (t, p) in zip(logits, settings_, strict=True)])
    np.testing.assert_allclose(sampling.warp(logits, temperature, top_p).numpy(), expected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_p=st.integers(1, 64).map(lambda n: n / 64),
)
def test_warp_of_any_row(logits, temperature, top_p):
    """Includes ties. Where the kept mass meets top_p exactly, rounding may decide: those rows are skipped."""
    probs = np.sort(slow_warp(np.array(logits, dtype=float), temperature or 1.0, 1.0))[::-1]
    if np.abs(np.cumsum(probs) - top_p).min() < 1e-6:
        return
    warped = warp_one([float(x) for x in logits], temperature, top_p)
    np.testing.assert_allclose(warped, slow_warp(np.array(logits, dtype=float), temperature, top_p), atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-4, 4), min_size=12, max_size=12), min_size=1, max_size=5),
    top_p=st.lists(st.sampled_from([0.05, 0.31, 0.5, 0.72, 0.9, 0.99, 1.0]), min_size=5, max_size=5),
)
def test_nucleus_among_the_highest_of_a_long_row(rows, top_p):
    """Rows that count as long, with many ties; of some the highest five have all of it, of others not."""
    probs = torch.tensor(rows).float().softmax(-1)
    wanted = torch.tensor(top_p[: len(rows)])
    ordered = probs.double().sort(-1, descending=True).values.cumsum(-1)
    if ((ordered - wanted[:, None]).abs() < 1e-6)[wanted < 1].any():
        return  # rounding decides
    with mock.patch.multiple(sampling, SEARCHED=12, HIGHEST=5):
        found = sampling._nucleus(probs, wanted)
    torch.testing.assert_close(found, sampling._searched_nucleus(probs, wanted))
    assert torch.equal(found > 0, sampling._searched_nucleus(probs, wanted) > 0)


def test_a_long_row_of_nan_has_no_nucleus():
    probs = torch.randn(3, sampling.SEARCHED).softmax(-1)
    probs[1] = float("nan")
    found = sampling._nucleus(probs, torch.full((3,), 0.02))
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


def test_temperature_zero_takes_the_first_of_equal_logits():
    assert warp_one([1.0, 3.0, 3.0, 0.0], 0.0, 0.5).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_nucleus_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    torch.testing.assert_close(warp_one(logits, 1.0, 0.6), torch.tensor([0.625, 0.375, 0.0]))
    torch.testing.assert_close(warp_one(logits, 1.0, 0.4), torch.tensor([1.0, 0.0, 0.0]))


def test_nucleus_is_taken_after_the_temperature():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    assert (warp_one(logits, 10.0, 0.6) > 0).tolist() == [True, True, False]
    assert (warp_one(logits, 0.2, 0.9) > 0).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_warp_is_float32_and_sums_to_one(dtype):
    logits = (torch.randn(8, 100, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    warped = sampling.warp(logits, torch.full((8,), 0.7), torch.full((8,), 0.95))
    assert warped.dtype == torch.float32
    torch.testing.assert_close(warped.sum(-1), torch.ones(8))


def test_draw_has_the_distribution_of_its_row():
    probs = torch.randn(60, generator=torch.Generator().manual_seed(2)).mul(1.5).softmax(-1)
    count = 20_000
    noise = rng.uniform(torch.arange(count), torch.zeros(count), rng.STUDENT)
    drawn = torch.bincount(sampling.draw(probs.expand(count, -1), noise), minlength=60)
    assert (
        stats.chisquare(drawn.numpy(), probs.double().numpy() / probs.double().sum().item() * count).pvalue > P_VALUE
    )


LARGE = 151_936  # entries of Qwen's vocabulary


def large_row(seed: int) -> torch.Tensor:
    """Logits as a bfloat16 head makes them: many are equal."""
    return (torch.randn(1, LARGE, generator=torch.Generator().manual_seed(seed)) * 3).bfloat16()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_law_of_a_draw_from_a_large_vocabulary(temperature, top_p):
    """Chi-square over bins of about equal mass, of tokens that lie all over the row; none of no probability."""
    probs = sampling.warp(large_row(3), torch.tensor([temperature]), torch.tensor([top_p]))
    count, bins = 4000, 160
    noise = rng.uniform(torch.arange(count), torch.full((count,), 17), rng.TEACHER)
    drawn = torch.cat([sampling.draw(probs.expand(500, -1), part) for part in noise.split(500)])
    exact = probs[0].double() / probs[0].double().sum()
    assert (exact[drawn] > 0).all()
    order = torch.randperm(LARGE, generator=torch.Generator().manual_seed(4))
    bin_of = torch.empty(LARGE, dtype=torch.int64)
    bin_of[order] = (exact[order].cumsum(0) * bins).long().clamp_max(bins - 1)
    expected = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, exact) * count
    observed = torch.bincount(bin_of[drawn], minlength=bins)
    keep = expected > 8
    assert keep.sum() > 40
    observed, expected = (torch.cat([x[keep], x[~keep].sum()[None]]) for x in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected.clamp_min(1)).sum().item()
    assert stats.chi2.sf(statistic, int(keep.sum())) > P_VALUE


def test_draws_of_a_large_row_are_those_of_one_long_sum():
    """In two steps, and by a cumulative sum over all entries: the same tokens, but for rounding at a boundary."""
    probs = large_row(5).float().softmax(-1)
    noise = rng.uniform(torch.arange(2000), torch.zeros(2000), rng.STUDENT)
    cdf = probs[0].double().cumsum(0)
    expected = torch.searchsorted(cdf, noise * cdf[-1])
    drawn = torch.cat([sampling.draw(probs.expand(500, -1), part) for part in noise.split(500)])
    assert (drawn == expected).sum() >= 1998


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.95, 0.9999])
def test_nucleus_of_a_large_row_is_that_of_a_sort(top_p):
    """Of many equal probabilities at its edge the lower ids are in."""
    probs = large_row(6).float().softmax(-1)
    order = probs[0].argsort(descending=True, stable=True)
    before = probs[0][order].double().cumsum(0) - probs[0][order]
    inside = torch.zeros(LARGE, dtype=torch.bool)
    inside[order] = before < top_p
    found = sampling.warp(large_row(6), None, torch.tensor([top_p]))[0] > 0
    edge = probs[0][inside].min()
    assert torch.equal(found[probs[0] != edge], inside[probs[0] != edge])
    ties = (probs[0] == edge).nonzero().squeeze(1)
    kept = int(found[ties].sum())
    assert found[ties[:kept]].all(), "the lower ids"
    assert abs(kept - inside[ties].sum()) * edge <= max(edge, 1e-6), "as many as a sum in float32 can tell"


@pytest.mark.parametrize("width", [3, 500, 1024, 1025, 1300, 5000])
def test_draw_at_every_width(width):
    """The first and the last possible token of rows of one block, several, and a rest. Any row gives some token."""
    probs = torch.zeros(4, width)
    probs[0, -1], probs[1, 0], probs[2, [1, -1]] = 1.0, 1e-30, 0.5
    probs[3] = float("nan")
    low, high = (sampling.draw(probs, torch.full((4,), u, dtype=torch.float64)).tolist() for u in (2.0**-54, 1.0))
    assert low[:3] == [width - 1, 0, 1] and high[:3] == [width - 1, 0, width - 1]
    assert 0 <= low[3] < width
    assert 0 <= sampling.draw(torch.zeros(1, width), torch.tensor([0.5], dtype=torch.float64)).item() < width


def test_draw_inverts_the_distribution():
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25])
    noise = torch.tensor([1e-9, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 1e-9], dtype=torch.float64)
    assert sampling.draw(probs.expand(6, -1), noise).tolist() == [0, 0, 2, 2, 3, 3]


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-8, 0.1, 1.0]), min_size=1, max_size=10).filter(any),
    noise=st.sampled_from([2.0**-54, 0.25, 0.5, 0.75, 1 - 2.0**-53]) | st.floats(1e-16, 1 - 1e-16),
)
def test_draw_never_takes_an_impossible_token(weights, noise):
    token = sampling.draw(torch.tensor([weights]), torch.tensor([noise], dtype=torch.float64)).item()
    assert weights[token] > 0


def test_the_largest_uniform_number_draws_a_possible_token():
    """1.0 comes by rounding; neither it nor a number just above 0 may reach a token of probability zero."""
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(2, -1)
    drawn = sampling.draw(probs, torch.tensor([1.0, 2.0**-54], dtype=torch.float64))
    assert drawn.tolist() == [2, 1]


def test_setting_rows_are_the_settings_row_by_row():
    """Every setting but the gate's name, in a type that holds it exactly; a new field of the settings is a new row."""
    first = sampling.SamplingSettings(sampling.KEEP_ALL, "floor", 0.25, 30, False, 4, 2, 1.0, 0.5, 0.75, 2.0, 0.5)
    second = sampling.SamplingSettings(0)
    rows = sampling.SettingRows.of([first, second], "cpu")
    names = [field.name for field in fields(sampling.SamplingSettings) if field.name != "gate"]
    for name in names:
        values = [getattr(first, name), getattr(second, name)]
        assert getattr(rows, name).tolist() == values and values[0] != values[1], name
    assert (rows.top_k.dtype, rows.threshold.dtype, rows.write_back.dtype) == (torch.int64, torch.float32, torch.bool)
    assert rows.select(torch.tensor([0, 1, 1])).top_k.tolist() == [sampling.KEEP_ALL, 0, 0]
    assert rows.select(torch.tensor([1, 0])).select(torch.tensor([1])).threshold.tolist() == [0.25]
    assert rows.select(torch.tensor([1, 1, 0])).select(slice(1, 3)).write_back.tolist() == [True, False]
    assert rows.select(slice(1, 2)).top_k_decay_len.tolist() == [0]
    assert rows.select(torch.tensor([1])).values("threshold") == {0.0, 0.25}
    with pytest.raises(AttributeError, match="'gate' is no setting that rows have; they have top_k, threshold"):
        rows.gate  # noqa: B018
