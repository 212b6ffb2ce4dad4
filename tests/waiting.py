"""Waiting for an event, however long that takes; the guard is against a hang only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

GUARD_S = 1200.0


def wait_for(event: Callable[[], T], what: str, poll_s: float = 0.05) -> T:
    """Until `event` gives something true, which is returned."""
    deadline = time.monotonic() + GUARD_S
    while not (found := event()):
        assert time.monotonic() < deadline, f"{what}: not yet after {GUARD_S:.0f} s"
        time.sleep(poll_s)
    return found
