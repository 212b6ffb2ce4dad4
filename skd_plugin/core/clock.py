"""Where the time of a process goes, part by part. The parts of a lap add up to it, whatever they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

REST = "rest"  # what no part was open for


class Clock:
    """Of one thread. Parts may lie within each other; the seconds of an inner one are not the outer one's."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._mark = now()
        self._open = [REST]
        self._seconds: dict[str, float] = {}

    def _book(self) -> None:
        """Gives the time since the last call to the innermost open part."""
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now

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
