"""Ordinary speculative sampling, counted from a trace of the gate `interpolated` at 1.

There the distribution of every token is p, and whether a proposal is kept depends on its prefix alone, not on the
block it was drafted in. So one trace says how the same text would have come out of blocks of any length; and a bonus
token, which SKD's engine leaves out and ordinary speculative sampling draws from p, has the distribution of the token
in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Blocks(NamedTuple):
    forwards: int  # of the teacher, without that of the prompt
    kept: int  # proposals kept, without those that a bonus token makes needless


def count_blocks(kept: Sequence[bool], draft_len: int) -> Blocks:
    """Blocks of `draft_len` proposals (arXiv 2211.17192, Algorithm 1): each emits the proposals that are kept up to
    the first that is not, and one more token of the teacher. The last one may end early, with the response.

    Args:
        kept: of each response token, whether the student's proposal for it was kept.
    """
    place = forwards = total = 0
    while place < len(kept):
        run = 0
        while run < draft_len and place + run < len(kept) and kept[place + run]:
            run += 1
        forwards, total = forwards + 1, total + run
        place += run + 1
    return Blocks(forwards, total)
