"""What Python's garbage collector need not look at."""

from __future__ import annotations

import gc


def keep_what_is_there() -> None:
    """At the end of an actor's start: its half a million objects (modules, above all) stay for the whole run. A full
    collection would go through them again each time, for half a second in which the actor does nothing else.
    """
    gc.collect()
    gc.freeze()


def look_less_often() -> None:
    """Young objects are looked at each 10,000 in place of 700: requests make thousands, and have dropped most of them
    themselves until then. Not in a trainer, where what is found late may be memory of a GPU.
    """
    gc.set_threshold(10_000)
