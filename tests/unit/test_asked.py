"""An engine's prompts come in one message; tests/contract/test_asked.py has them go through OpenRLHF's generator."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    for prompt in "abcdefg":
        one.generate_responses.remote(prompt=prompt, label="")
    other.generate_responses.remote(prompt="z", label="")
    assert not sent
    one.ask(), other.ask()
    (key, calls), (other_key, alone) = sent
    assert [call["prompt"] for call in calls] == list("abcdefg") and len(alone) == 1
    assert key != other_key, "one message would take the answers of another"
    assert one.answers(3) == [(key, 2), (key, 2), (key, 3)]
    assert one.answers(20) == [(key, 1)] * 7
    assert other.answers(3) == [(other_key, 1)]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(1, 12), st.randoms())
def test_every_response_is_answered_once_in_the_order_in_which_they_end(
    samples: list[int], most: int, random: Random
) -> None:
    """Args: samples: responses to each prompt."""

    async def run() -> tuple[list[list[Any]], list[int]]:
        may_end = [asyncio.Event() for _ in samples]

        async def respond(prompt: int) -> list[tuple[int, int]]:
            await may_end[prompt].wait()
            return [(prompt, number) for number in range(samples[prompt])]

        begun = Begun()
        engine = SimpleNamespace(
            get_num_unfinished_requests=None,
            ask=SimpleNamespace(remote=lambda key, calls: begun.begin(key, respond, calls)),
            responses=SimpleNamespace(remote=lambda key, number: asyncio.ensure_future(begun.take(key, number))),
        )
        gathered = Gathered(engine)
        for prompt in range(len(samples)):
            gathered.generate_responses.remote(prompt=prompt)
        await gathered.ask()
        answers, order = gathered.answers(most), list(range(len(samples)))
        random.shuffle(order)
        for place in order:
            may_end[place].set()
            for _ in range(5):
                await together()
            ended = order[: order.index(place) + 1]
            arrived = [
                prompt for answer in answers if answer.done() for prompt, number in answer.result() if not number
            ]
            assert arrived == ended[: len(arrived)]
            assert len(ended) - len(arrived) < -(-len(samples) // most), "a message waits for more than its own"
        found = await asyncio.gather(*answers)
        assert not begun._messages, "answers are kept when they have been taken"
        return found, order

    answers, order = asyncio.run(run())
    assert len(answers) == min(most, len(samples))
    flat = [response for answer in answers for response in answer]
    assert flat == [(prompt, number) for prompt in order for number in range(samples[prompt])]


def test_a_message_says_at_once_what_failed_in_it() -> None:
    async def respond(prompt: str) -> list[str]:
        if prompt == "bad":
            raise ValueError("a bad prompt")
        if prompt == "endless":
            await asyncio.Event().wait()
        return [f"of {prompt}"]

    async def run() -> list[Any]:
        begun = Begun()
        await begun.begin("x", respond, [{"prompt": "good"}, {"prompt": "bad"}, {"prompt": "endless"}])
        await begun.begin("y", respond, [{"question": "?"}])
        calls = [("y", 1), ("x", 1), ("x", 2)]
        answers = await asyncio.gather(*(begun.take(*call) for call in calls), return_exceptions=True)
        assert not begun._messages, "answers are kept when they have been taken"
        return answers

    unknown, good, bad = asyncio.run(asyncio.wait_for(run(), 30))
    assert good == ["of good"]
    assert isinstance(unknown, TypeError) and "question" in str(unknown)
    assert isinstance(bad, ValueError) and "a bad prompt" in str(bad)


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
