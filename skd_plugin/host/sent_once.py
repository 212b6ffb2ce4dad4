"""What goes with every prompt to an engine's actor, and is read there once.

OpenRLHF hands its tokenizer to each call of `generate_responses`. Of 150,000 tokens that is 7 MB, 0.2 s to write and
0.6 s to read, for each prompt.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

# Through these go all calls of a tokenizer. Where one thread encodes and another sets its padding or truncation, the
# Rust below raises "Already borrowed"; and agents may have threads, whose samples share what is sent once.
_OF_TOKENIZERS = ("_encode_plus", "_decode")

_read: dict[ray.ObjectRef, asyncio.Future[Any]] = {}  # in this process


@dataclass(frozen=True)
class SentOnce:
    ref: ray.ObjectRef  # Ray fetches what an argument is, but not what is inside of one

    @classmethod
    def put(cls, value: Any) -> SentOnce:
        """In the process that sends it, which must live as long as it is read."""
        return cls(ray.put(value))

    async def value(self) -> Any:
        """All calls of an actor share what the first one reads."""
        if self.ref not in _read:
            _read[self.ref] = asyncio.ensure_future(_fetch(self.ref))
        return await _read[self.ref]


async def _fetch(ref: ray.ObjectRef) -> Any:
    value = await ref
    lock = threading.RLock()
    for name in _OF_TOKENIZERS:
        if hasattr(value, name):
            setattr(value, name, _one_at_a_time(getattr(value, name), lock))
    return value


def _one_at_a_time(method: Callable[..., Any], lock: threading.RLock) -> Callable[..., Any]:
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return method(*args, **kwargs)

    return locked
