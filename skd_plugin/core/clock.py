"""Where the time of a process goes, part by part. The parts of a lap add up to it, whatever they are.

Python is ahead of a GPU: it starts the kernels of one part and waits in another, which would then have the time of
both. There a part begins and ends where the GPU comes to it (`GpuClock`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

REST = "rest"  # what no part was open for


class Clock:
    """Of one thread. Parts may lie within each other; the seconds of an inner one are not the outer one's."""

    def __init__(self, now: Callable[[], Any] = time.perf_counter) -> None:
        self._now = now
        self._mark = now()
        self._open = [REST]
        self._seconds: dict[str, float] = {}

    def _book(self) -> None:
        """Gives the time since the last call to the innermost open part."""
        now = self._now()
        self._add(self._open[-1], self._mark, now)
        self._mark = now

    def _add(self, name: str, start: Any, end: Any) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + end - start

    def begin(self, name: str) -> None:
        self._book()
        self._open.append(name)

    def end(self) -> None:
        """Of the part that began last."""
        self._book()
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def split(self, name: str, inner: Mapping[str, float]) -> None:
        """Seconds that another process has measured of a part, while this one waited for it, are theirs.

        Where several processes were waited for, they may be more than the part has; then all of them shrink.
        """
        self._book()
        whole, total = self._seconds.get(name, 0.0), sum(inner.values())
        scale = min(1.0, whole / total) if total else 0.0
        self._seconds[name] = max(whole - total * scale, 0.0)
        for part, seconds in inner.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds * scale

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last call; their sum is all the time since then."""
        self._book()
        seconds, self._seconds = self._seconds, {}
        return seconds


class GpuClock(Clock):
    """In the time of the GPU that is the current one.

    A part has the time from where the GPU comes to it to where it has done what was started in it, with what it idled
    there. A lap waits for the GPU; nothing else does.
    """

    def __init__(self, now: Callable[[], Any] | None = None) -> None:
        """Args: now: records an event of the GPU; for tests."""
        self._intervals: list[tuple[str, Any, Any]] = []  # a part, and the events between which it was the open one
        super().__init__(now or _event_now)

    def _add(self, name: str, start: Any, end: Any) -> None:
        self._intervals.append((name, start, end))

    def split(self, name: str, inner: Mapping[str, float]) -> None:
        raise NotImplementedError("other processes have no events of this GPU")

    def lap(self) -> dict[str, float]:
        self._book()
        self._mark.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self._intervals:
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        self._intervals.clear()
        return seconds


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def clock_on(device: torch.device) -> Clock:
    """Of a process that works on this device."""
    return GpuClock() if device.type == "cuda" else Clock()
