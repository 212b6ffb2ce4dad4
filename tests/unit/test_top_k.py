"""The K largest by pieces, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skd_plugin.core.top_k import SORTED, piece_len, top_k


@given(st.integers(1, 3000), st.integers(1, 80), st.integers(0, 1 << 30), st.sampled_from([1.0, 3.0, 100.0]))
def test_as_a_sort_says(size: int, count: int, seed: int, spread: float) -> None:
    """Whole numbers make many ties, of which either may come first; no entry comes twice."""
    count = min(count, size)
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(3, size, generator=generator) * spread).round()
    top, ids = top_k(values, count)
    assert torch.equal(top, values.sort(-1, descending=True).values[:, :count])
    assert torch.equal(values.gather(1, ids), top)
    assert all(len(set(row)) == count for row in ids.tolist())


@pytest.mark.parametrize(
    "size, count", [(4096, 64), (151936, 64), (151936, 2), (32000, 10), (128, 1), (200, 64), (256, 256)]
)
def test_long_rows(size: int, count: int) -> None:
    values = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    top, ids = top_k(values, count)
    known, places = values.topk(count, dim=-1)
    assert torch.equal(top, known) and torch.equal(ids, places)


@given(st.integers(1, SORTED), st.integers(0, 1 << 30), st.booleans())
def test_of_equal_entries_of_a_short_row_the_lower_id_goes_first(size: int, seed: int, columns: bool) -> None:
    values = (torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) * 2).round() + 0.0  # no -0
    given = values.T.contiguous().T if columns else values
    top, ids = top_k(given, size)
    known, places = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top, known) and torch.equal(ids, places)
    assert torch.equal(given, values), "what is sorted is a copy"


@pytest.mark.parametrize("size", [200, 5000])
def test_what_a_model_rules_out_comes_last(size: int) -> None:
    values = torch.full((1, size), -torch.inf)
    values[0, [7, size - 1]] = torch.tensor([1.0, 2.0])
    top, ids = top_k(values, 3)
    assert top.tolist() == [[2.0, 1.0, -torch.inf]] and ids[0, :2].tolist() == [size - 1, 7]


@pytest.mark.parametrize("size", [200, 5000])
def test_no_number_is_found(size: int) -> None:
    """Where a row has one, so that whoever looks at its top is told."""
    values = torch.zeros(1, size)
    values[0, 123] = torch.nan
    assert top_k(values, 4)[0].isnan().any()


def test_both_short_rows_are_short() -> None:
    for size in (5000, 32000, 151936):
        for count in (2, 25, 64):
            length = piece_len(size, count)
            assert size / length + count * length < 4 * (size * count) ** 0.5 < 2 * size
