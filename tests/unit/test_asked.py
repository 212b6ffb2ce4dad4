"""An engine's prompts come in one message; tests/contract/test_asked.py has them go through OpenRLHF's generator."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from skd_plugin.host.asked import Begun, Gathered, together


def test_calls_are_gathered_and_sent_as_one() -> None:
    sent: list[Any] = []
    engine = SimpleNamespace(
        get_num_unfinished_requests="how many",
        ask=SimpleNamespace(remote=lambda key, calls: sent.append((key, calls))),
        responses=SimpleNamespace(remote=lambda key, number: (key, number)),
    )
    one, other = Gathered(engine), Gathered(engine)
    assert one.get_num_unfinished_requests == "how many"
    handed_out = [one.generate_responses.remote(prompt=prompt, label="") for prompt in ("a", "b")]
    assert handed_out == [(one, 0), (one, 1)] and not sent
    one.ask(), other.ask()
    (key, calls), (other_key, none) = sent
    assert [call["prompt"] for call in calls] == ["a", "b"] and none == []
    assert key != other_key, "one message would take the answers of another"
    assert [gathered.response(number) for gathered, number in handed_out] == [(key, 0), (key, 1)]


def test_a_call_is_answered_whoever_else_fails() -> None:
    async def respond(prompt: str) -> str:
        if prompt == "bad":
            raise ValueError("a bad prompt")
        return f"of {prompt}"

    async def run() -> list[Any]:
        begun = Begun()
        await begun.begin("x", respond, [{"prompt": "good"}, {"prompt": "bad"}, {"question": "?"}])
        await begun.begin("y", respond, [{"prompt": "later"}])
        calls = [("y", 0), ("x", 2), ("x", 1), ("x", 0)]
        answers = await asyncio.gather(*(begun.take(*call) for call in calls), return_exceptions=True)
        assert not begun._tasks, "answers are kept when they have been taken"
        return answers

    later, unknown, bad, good = asyncio.run(run())
    assert (later, good) == ("of later", "of good")
    assert "question" in str(unknown) and "a bad prompt" in str(bad)


@pytest.mark.parametrize("inside", [0, 3])
def test_what_is_begun_together_reaches_the_engine_together(inside: int) -> None:
    """And before the message is answered. Args: inside: further tasks that a call waits for on its way."""
    events: list[str] = []

    async def respond(number: int, depth: int = inside) -> None:
        if depth:
            await asyncio.gather(respond(number, depth - 1))
            return
        events.append(f"prepared {number}")
        await together()
        events.append(f"asked {number}")

    asyncio.run(Begun().begin("x", respond, [{"number": number} for number in range(3)]))
    assert events == [f"{what} {number}" for what in ("prepared", "asked") for number in range(3)]
