"""Where the response tokens of a batch are: in OpenRLHF's per-token tensors, and in the model's output.

A causal model predicts token t + 1 at position t. OpenRLHF's per-token tensors are therefore [B, T - 1]: entry t
belongs to token t + 1. The model's output has the shape of the batch, or, where sequences are packed, is one row of
all tokens without padding. This module is the only place that knows it.

Shapes: B sequences of T tokens with their padding, S tokens without it, N response tokens of the batch, row by row in
their order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class ResponseLayout:
    """The N response tokens of a padded batch."""

    action_mask: torch.Tensor  # bool [B, T - 1], true at the entries of response tokens
    row_N: torch.Tensor  # int64, sequence of each
    entry_N: torch.Tensor  # int64, its entry in the per-token tensors
    output_row_N: torch.Tensor  # int64, row of the model's output that predicts it
    output_place_N: torch.Tensor  # int64, place in that row

    @classmethod
    def of(cls, action_mask: torch.Tensor) -> ResponseLayout:
        """`action_mask`: [B, T - 1], any type; several spans a row are several turns."""
        mask = action_mask.bool()
        row_N, entry_N = mask.nonzero(as_tuple=True)
        return cls(mask, row_N, entry_N, row_N, entry_N)

    @classmethod
    def packed(cls, action_mask: torch.Tensor, attention_mask: torch.Tensor) -> ResponseLayout:
        """Of a batch whose model's output is [1, S, ...]: the tokens of `attention_mask` [B, T], row by row."""
        layout = cls.of(action_mask)
        place_BT = attention_mask.flatten().cumsum(0).view_as(attention_mask) - 1
        place_N = place_BT[layout.row_N, layout.entry_N]
        return replace(layout, output_row_N=torch.zeros_like(place_N), output_place_N=place_N)

    def __len__(self) -> int:
        return len(self.row_N)

    def within(self, first: int, count: int) -> tuple[slice, ResponseLayout]:
        """Of a packed output that is spread over ranks, the part of places `first` to `first + count`: which of the N
        tokens are predicted there, and where in the part.
        """
        bounds = torch.tensor([first, first + count], device=self.output_place_N.device)
        start, stop = torch.searchsorted(self.output_place_N, bounds).tolist()  # tokens stand in the order of places
        own = slice(start, stop)
        places_N = self.output_place_N[own] - first
        return own, ResponseLayout(
            self.action_mask, self.row_N[own], self.entry_N[own], self.output_row_N[own], places_N
        )

    def counts(self) -> list[int]:
        """Response tokens of each sequence."""
        return self.action_mask.sum(1).tolist()

    def tokens(self, sequences_BT: torch.Tensor) -> torch.Tensor:
        """The response tokens themselves [N]."""
        return sequences_BT[self.row_N, self.entry_N + 1]

    def predictions(self, output: torch.Tensor) -> torch.Tensor:
        """What a model's output [B, T, ...] or [1, S, ...] says of each response token, before it has seen it:
        [N, ...].
        """
        return output[self.output_row_N, self.output_place_N]

    def take(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Entries of a per-token tensor [B, T - 1] that belong to response tokens: [N]."""
        return values_BT[self.row_N, self.entry_N]

    def spread(self, values_N: torch.Tensor) -> torch.Tensor:
        """A per-token tensor [B, T - 1] with these values, 0 elsewhere; differentiable, also where N is 0."""
        places = self.row_N.to(values_N.device), self.entry_N.to(values_N.device)
        return values_N.new_zeros(self.action_mask.shape).index_put(places, values_N)

    def put(self, values_NM: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A model's output with these values at the predictions of response tokens, 0 elsewhere: [B, T, M] or
        [1, S, M].

        Args:
            output: any output of the model, of which both sizes are taken.
        """
        shape = (*output.shape[:2], values_NM.shape[1])
        return values_NM.new_zeros(shape).index_put((self.output_row_N, self.output_place_N), values_NM)

    def to(self, device: torch.device) -> ResponseLayout:
        return ResponseLayout(*(getattr(self, field.name).to(device) for field in fields(self)))


def first_response_place(action_mask: torch.Tensor) -> int | None:
    """Place in its sequence of the first response token of one row [T - 1]; None where there is none."""
    entries = action_mask.bool().nonzero()
    return int(entries[0]) + 1 if len(entries) else None
