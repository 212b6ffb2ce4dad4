"""Tokens that Triton's kernels draw, against torch's operators and against their law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from skd_plugin.core import rng
from skd_plugin.core.logit_rows import LogitRows
from skd_plugin.core.sampling import SamplingSettings, SettingRows
from skd_plugin.engine.kernels import off
from skd_plugin.engine.triton_rows import TritonRows
from tests.unit.test_sampling import P_VALUE, slow_warp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [(temperature, top_p) for temperature in (0.0, 0.6, 1.0, 2.0) for top_p in (0.05, 0.5, 0.9, 1.0)]


def warped(kinds: list[tuple[float, float]]) -> SettingRows:
    """Of the student; the teacher's are those of the next row."""
    own = [
        SamplingSettings(3, student_temperature=a, student_top_p=b, teacher_temperature=c, teacher_top_p=d)
        for (a, b), (c, d) in zip(kinds, kinds[1:] + kinds[:1], strict=True)
    ]
    return SettingRows.of(own, DEVICE)


def noise(count: int, seed: int) -> torch.Tensor:
    return rng.uniform(torch.arange(count), torch.full((count,), seed), rng.STUDENT).to(DEVICE)


@pytest.mark.parametrize("ends", [None, [3, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [9, 200, 5003])
def test_as_torch(vocab_size: int, dtype: torch.dtype, ends: list[int] | None) -> None:
    """Every temperature beside every nucleus, in half precision with many equal logits; rows in another order."""
    generator = torch.Generator().manual_seed(vocab_size)
    values = (torch.randn(len(KINDS), vocab_size, generator=generator) * 3).to(dtype).to(DEVICE)
    order = torch.randperm(len(KINDS), generator=generator).to(DEVICE)
    ends_E = None if ends is None else torch.tensor(ends, device=DEVICE)
    for model in ("student", "teacher"):
        given = warped(KINDS), model, noise(len(KINDS), vocab_size)
        ours, probs_NV = TritonRows(values, order, ends_E), LogitRows(values, order, ends_E).warp(*given[:2])
        assert off(ours.sample(*given), probs_NV, given[2]) < 1e-6
        torch.testing.assert_close(ours.warp(*given[:2]), probs_NV, atol=1e-6, rtol=1e-5)


def test_a_vocabulary_of_a_real_model() -> None:
    kinds = [(1.0, 1.0), (0.5, 0.5), (1.0, 0.95)]
    values = torch.randn(len(kinds), 151_936, generator=torch.Generator().manual_seed(0)).mul(4).bfloat16().to(DEVICE)
    given = warped(kinds), "student", noise(len(kinds), 1)
    probs_NV = LogitRows.of(values).warp(*given[:2])
    assert off(TritonRows.of(values).sample(*given), probs_NV, given[2]) < 1e-6
    torch.testing.assert_close(TritonRows.of(values).warp(*given[:2]), probs_NV, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p", "count"), [(1.0, 1.0, 1000), (0.7, 0.8, 300)])
def test_their_law(temperature: float, top_p: float, count: int) -> None:
    row = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 1.5
    expected = slow_warp(row.double().numpy(), temperature, top_p)
    rows = TritonRows(row.expand(2, -1).contiguous().to(DEVICE), torch.zeros(count, dtype=torch.int64, device=DEVICE))
    token_N = rows.sample(warped([(temperature, top_p)] * count), "student", noise(count, 17))
    drawn = np.bincount(token_N.cpu().numpy(), minlength=40)
    inside = expected > 0
    assert drawn[~inside].sum() == 0
    assert stats.chisquare(drawn[inside], expected[inside] * count).pvalue > P_VALUE


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_p=st.integers(1, 64).map(lambda n: n / 64),
    number=st.sampled_from([2.0**-54, 0.25, 0.75, 1 - 2.0**-53, 1.0]) | st.floats(1e-16, 1 - 1e-16),
)
def test_any_row(values: list[int], temperature: float, top_p: float, number: float) -> None:
    """Ties, and the first and the last number. Where the kept mass meets top_p, or the number a boundary, rounding may
    decide.
    """
    row = np.array(values, dtype=float)
    probs = np.sort(slow_warp(row, temperature or 1.0, 1.0))[::-1]
    if np.abs(np.cumsum(probs) - top_p).min() < 1e-6:
        return
    rows = TritonRows.of(torch.tensor([values], device=DEVICE).float())
    uniform = torch.tensor([number], dtype=torch.float64, device=DEVICE)
    token = int(rows.sample(warped([(temperature, top_p)]), "student", uniform))
    expected = slow_warp(row, temperature, top_p)
    found = rows.warp(warped([(temperature, top_p)]), "student")[0]
    np.testing.assert_allclose(found.cpu().numpy(), expected, atol=1e-6)
    assert expected[token] > 0
    up_to = expected.cumsum()[token]
    assert up_to - expected[token] - 1e-6 <= number <= up_to + 1e-6


@pytest.mark.filterwarnings("ignore:All-NaN")  # of numpy
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_logits_that_are_none_draw_some_token(top_p: float) -> None:
    """The run stops at them where they are recorded; until then a token is an id."""
    values = torch.zeros(4, 70, device=DEVICE)
    values[0], values[1], values[2, 3], values[3, 5] = torch.nan, -torch.inf, torch.inf, torch.nan
    token_N = TritonRows.of(values).sample(warped([(1.0, top_p)] * 4), "student", noise(4, 3))
    assert ((token_N >= 0) & (token_N < 70)).all()


def test_entries_that_are_ruled_out_are_never_drawn() -> None:
    values = torch.full((3, 5000), -torch.inf, device=DEVICE)
    values[0, 4999], values[1, [0, 2500]], values[2, 100:120] = 1.0, 0.0, 3.0
    for number in (2.0**-54, 0.5, 1.0):
        for top_p in (1.0, 0.4):
            uniform = torch.full((3,), number, dtype=torch.float64, device=DEVICE)
            token_N = TritonRows.of(values).sample(warped([(1.0, top_p)] * 3), "student", uniform)
            assert values.gather(1, token_N[:, None]).isfinite().all()
