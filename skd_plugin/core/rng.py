"""Counter-based random numbers: a draw is a pure function of (seed, position, stream).

A sample therefore does not depend on which other requests share its batch, on the draft length, or on how often a
position was drafted and thrown away; every tensor-parallel rank draws the same number without talking to the others.
"""

from __future__ import annotations

from typing import TypeVar

import torch

# Streams: the student's proposals, the teacher's replacements, a gate's chance, the student asked a second time.
STUDENT, TEACHER, COIN, AGAIN = range(4)
_NUM_STREAMS = 4

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the odd constants of SplitMix64, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


Word = TypeVar("Word", torch.Tensor, int)  # 64 bits


def _wrapped(x: Word) -> Word:
    """As a signed 64-bit integer, which a tensor's are by themselves."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63) if isinstance(x, int) else x


def _shift_right(x: Word, bits: int) -> Word:
    """Logical shift; `>>` keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Word) -> Word:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = _wrapped((x ^ _shift_right(x, 30)) * _MIX_1)
    x = _wrapped((x ^ _shift_right(x, 27)) * _MIX_2)
    return x ^ _shift_right(x, 31)


def uniform(seed_N: torch.Tensor, position_N: torch.Tensor, stream: int) -> torch.Tensor:
    """Uniform numbers in (0, 1]; 1 itself comes by rounding, once in 2^53 draws.

    Args:
        seed_N: int64 [N], one seed a request.
        position_N: integer [N], index of the token in its sequence (prompt included).
        stream: `STUDENT`, `TEACHER`, `COIN` or `AGAIN`; draws of different streams are independent.

    Returns:
        float64 [N].
    """
    counter = (position_N.to(torch.int64) * _NUM_STREAMS + stream + 1) * _GOLDEN
    bits = _shift_right(_mix(_mix(seed_N) + counter), 11)
    return (bits.to(torch.float64) + 0.5) * 2.0**-53


def derive_seed(*parts: int) -> int:
    """One signed 64-bit seed from several integers, e.g. (run seed, step, sample number)."""
    state = 0
    for part in parts:
        state = _mix(_wrapped(state + _GOLDEN + part))
    return state
