"""Where response tokens are: entry t of a per-token tensor belongs to token t + 1 and is predicted at position t."""

from __future__ import annotations

import pytest
import torch

from skd_plugin.core.layout import ResponseLayout, first_response_place

# Two turns in the first row, no response in the second, padding on both sides in the third.
SEQUENCES = torch.tensor([[11, 12, 13, 14, 15, 16, 0], [21, 22, 0, 0, 0, 0, 0], [0, 31, 32, 33, 34, 0, 0]])
ATTENTION = (SEQUENCES > 0).long()
RESPONSE = [(0, 2), (0, 5), (2, 3), (2, 4)]  # (row, place in its sequence)


@pytest.fixture
def layout() -> ResponseLayout:
    mask = torch.zeros(3, 6, dtype=torch.long)
    for row, place in RESPONSE:
        mask[row, place - 1] = 1
    return ResponseLayout.of(mask)


def test_tokens_and_counts(layout: ResponseLayout) -> None:
    assert len(layout) == 4 and layout.counts() == [2, 0, 2]
    assert layout.tokens(SEQUENCES).tolist() == [13, 16, 33, 34]


def test_a_token_is_predicted_one_position_before(layout: ResponseLayout) -> None:
    """An output that names the position it was made at."""
    output = torch.arange(21).view(3, 7, 1)
    assert layout.predictions(output).squeeze(1).tolist() == [7 * row + place - 1 for row, place in RESPONSE]


def test_a_packed_output_is_read_and_written_at_the_same_tokens(layout: ResponseLayout) -> None:
    padded = torch.randn(3, 7, 5)
    packed = padded[ATTENTION.bool()][None]
    of_packed = ResponseLayout.packed(layout.action_mask, ATTENTION)
    assert torch.equal(of_packed.predictions(packed), layout.predictions(padded))
    values = torch.randn(4, 2)
    output = of_packed.put(values, packed)
    assert output.shape == (1, 12, 2) and torch.equal(output[0], layout.put(values, padded)[ATTENTION.bool()])
    assert torch.equal(of_packed.tokens(SEQUENCES), layout.tokens(SEQUENCES))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_of_a_packed_output_have_all_tokens_once(layout: ResponseLayout, ranks: int) -> None:
    """Each rank of a ring has as many places, the last ones padding; a rank may have no response token."""
    of_packed = ResponseLayout.packed(layout.action_mask, ATTENTION)
    length = -(-int(ATTENTION.sum()) // ranks)
    packed = torch.nn.functional.pad(SEQUENCES[ATTENTION.bool()], (0, ranks * length - int(ATTENTION.sum())))
    tokens, wanted = [], of_packed.predictions(packed[None, :, None]).squeeze(1)
    for rank in range(ranks):
        own, part = of_packed.within(rank * length, length)
        local = packed[rank * length :][:length][None, :, None]
        assert torch.equal(part.predictions(local).squeeze(1), wanted[own])
        assert torch.equal(part.put(torch.ones(len(part), 2), local).sum((1, 2)), torch.tensor([2.0 * len(part)]))
        tokens += part.tokens(SEQUENCES).tolist()
    assert tokens == of_packed.tokens(SEQUENCES).tolist()


def test_spread_and_take_are_inverse(layout: ResponseLayout) -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    spread = layout.spread(values)
    expected = torch.zeros(3, 6)
    for value, (row, place) in zip((1, 2, 3, 4), RESPONSE, strict=True):
        expected[row, place - 1] = value
    assert torch.equal(spread, expected) and torch.equal(layout.take(spread), values)
    (spread * torch.arange(18).view(3, 6)).sum().backward()
    assert values.grad.tolist() == [6 * row + place - 1 for row, place in RESPONSE]


def test_put_is_the_inverse_of_predictions(layout: ResponseLayout) -> None:
    values = torch.randn(4, 2)
    output = layout.put(values, torch.empty(3, 7, 9))
    assert output.shape == (3, 7, 2) and torch.equal(layout.predictions(output), values)
    assert int((output != 0).any(-1).sum()) == 4


def test_no_response_at_all_keeps_a_graph() -> None:
    layout = ResponseLayout.of(torch.zeros(2, 3))
    values = torch.zeros(0, requires_grad=True)
    layout.spread(values).sum().backward()
    assert len(layout) == 0 and values.grad is not None


def test_first_place_of_a_response() -> None:
    assert first_response_place(torch.tensor([0, 0, 1, 1])) == 3
    assert first_response_place(torch.zeros(4)) is None
