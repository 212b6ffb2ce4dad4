"""What goes with every prompt is read once in a process."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

from skd_plugin.host.sent_once import SentOnce


class Ref:
    """In place of Ray's."""

    def __init__(self, value: Any) -> None:
        self._value, self.reads = value, 0

    def __await__(self) -> Generator[Any, None, Any]:
        self.reads += 1
        yield from asyncio.sleep(0).__await__()
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


def ask(*sent: SentOnce) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(one.value() for one in sent), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_calls_share_what_the_first_one_reads() -> None:
    value, ref = object(), Ref(object())
    ref._value = value
    other = Ref(None)
    first, second, last = ask(SentOnce(ref), SentOnce(ref), SentOnce(other))
    assert first is value and second is value and last is None
    assert ref.reads == 1 and other.reads == 1


def test_what_is_lost_is_an_error_for_every_call() -> None:
    sent = SentOnce(Ref(ConnectionError("its owner has died")))
    assert [str(found) for found in ask(sent, sent)] == ["its owner has died"] * 2


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skd_plugin.host.sent_once._read", {})
