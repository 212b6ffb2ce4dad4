"""What goes with every prompt is read once in a process."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from skd_plugin.host.sent_once import SentOnce
from skd_plugin.models import load_tokenizer
from tests.recipes import PAIR


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


def test_a_tokenizer_bears_the_threads_of_agents() -> None:
    """Without its lock two of them raise "Already borrowed", nearly each time."""
    (tokenizer,) = ask(SentOnce(Ref(load_tokenizer(str(PAIR / "student"), "student"))))
    texts = ["tom has 47 coins . " * 100] * 8

    def lengths(options: dict[str, Any]) -> set[int]:
        return {len(ids) for _ in range(10) for ids in tokenizer(texts, **options).input_ids}

    cut = {"truncation": True, "max_length": 50, "padding": True}
    with ThreadPoolExecutor(2) as pool:
        whole, short = pool.map(lengths, [{}, cut])
    assert min(whole) > 200 and short == {50}


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skd_plugin.host.sent_once._read", {})
