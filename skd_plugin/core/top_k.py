"""The K largest of a row of many, by the largest of each of its pieces.

Of a row that is cut into pieces the K largest entries are all in the K pieces whose own largest are highest: an entry
of any other piece has at least K above it, or as high. So one pass finds the largest of each piece, and what is sorted
out then are two short rows: the largest of each piece, and the entries of K pieces. On a CPU a row of a few hundred
entries is sorted whole.

Shapes: N rows, V entries, P pieces, L entries of a piece, K entries that are wanted.
"""

from __future__ import annotations

import math

import torch

SORTED = 256  # entries of a row, up to which it is faster to sort all of it


def piece_len(size: int, count: int) -> int:
    """L, a power of two, with which both short rows are about as long as each other.

    Args:
        size: V.
        count: K.
    """
    return 1 << max(3, round(math.log2(size / max(count, 1)) / 2))


def top_k(values_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch.topk`: values and ids (int64), [N, K] each, the highest first."""
    size = values_NV.shape[1]
    if size <= SORTED and values_NV.device.type == "cpu" and values_NV.dtype == torch.float32:
        return _of_sorted(values_NV, count)
    length = piece_len(size, count)
    pieces = size // length
    if 2 * count > pieces:  # the short rows would not be short
        return values_NV.topk(count, dim=-1)
    whole = pieces * length
    # The pieces lie among each other, every P-th entry, so that their largest are found in step with the memory.
    highest_NP = values_NV[:, :whole].unflatten(1, (length, pieces)).amax(1)
    piece_NK = highest_NP.topk(count, dim=-1).indices
    ids_NX = (piece_NK[:, :, None] + torch.arange(0, whole, pieces, device=values_NV.device)).flatten(1)
    if whole < size:
        behind = torch.arange(whole, size, device=values_NV.device).expand(len(values_NV), -1)
        ids_NX = torch.cat([ids_NX, behind], 1)
    top_NK, place_NK = values_NV.gather(1, ids_NX).topk(count, dim=-1)
    return top_NK, ids_NX.gather(1, place_NK)


def _of_sorted(values_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of equal entries the one of the lower id goes first.

    numpy sorts integers by vector instructions, but not numbers with their ids: so each entry is one integer, its bits
    as a number of the same order above, its id below.
    """
    bits_NV = values_NV.contiguous().view(torch.int32)
    ordered_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)  # of a number below 0 all but the sign
    last = values_NV.shape[1] - 1
    keys_NV = (ordered_NV.long() << 32) | torch.arange(last, -1, -1)
    keys_NV.numpy().sort(axis=1)
    ids_NK = last - (keys_NV[:, -count:].flip(1) & 0xFFFFFFFF)
    return values_NV.gather(1, ids_NK), ids_NK
