"""What a value of a file must be to be shown: a page draws numbers in float32, and holds text as UTF-8."""

from __future__ import annotations

from typing import TypeGuard

LARGEST = 1e30  # of a number: sums, margins and float32 columns stay finite
LAST_STEP = 2**32 - 1  # what a column of the packed responses holds
LAST_ID = 2**31 - 1  # of a token


def is_whole(value: object, least: int, most: int) -> TypeGuard[int]:
    """Whether it is a whole number within these bounds; true and false are none."""
    return type(value) is int and least <= value <= most


def drawable(value: object) -> float | None:
    """The number; None for what is none, is infinite or NaN, or too large to draw. true and false are no numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= LARGEST else None


def clean(text: str) -> str:
    """The text as UTF-8 has it: halves of characters (surrogates) joined where they are a pair, else U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def short(name: str) -> str:
    """A name that a note can quote."""
    return repr(name if len(name) <= 60 else f"{name[:60]}...")
