"""Prompts on their way to the engines, each with how the responses to it are sampled.

OpenRLHF hands a prompt on to an engine's actor as it is, so what travels with it needs no word to the engine before:
an engine may have requests of several steps, or of a step and an evaluation, under way.

OpenRLHF sends an engine one message a prompt. Of 64 the last comes 50 ms after the first, while the engine samples for
the few that are there. Here an engine's prompts go in one message and reach it together (`Gathered`, `Begun`). Nor do
the responses come one by one: whenever OpenRLHF waits for one, Ray looks at all that are left, which for 4,096 took
half of the controller's time.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import ray

from skd_plugin.engine.sampling_rule import SamplingRule

AT_ONCE = 512  # messages of responses that the controller waits for

Respond = Callable[..., Awaitable[list[Any]]]

# Of the event loop: in fewer a request of OpenRLHF's single-turn executor has reached the engine. The messages that
# wait for the responses come behind it then; Ray takes them in other threads, which would hold this one up.
ROUNDS = 8


@dataclass(frozen=True)
class SampledBy:
    """How the responses of a step, or of an evaluation, are sampled."""

    rule: SamplingRule
    seed: int  # of the run and the step


@dataclass(frozen=True)
class AskedSample:
    """One response that is asked for; the same (seed, prompt, number) gives the same tokens."""

    prompt: str  # a `PairedPrompt` where the teacher has its own
    by: SampledBy
    number: int = 1  # among the responses to this prompt that are sampled by the same


@dataclass(frozen=True)
class AskedPrompt:
    """What the generator sends in place of a prompt."""

    prompt: str
    by: SampledBy
    before: int = 0  # how often the prompt was sent before, to be sampled by the same

    def samples(self, number: int) -> list[AskedSample]:
        """The responses that are asked for now, so many."""
        first = 1 + self.before * number
        return [AskedSample(self.prompt, self.by, first + index) for index in range(number)]


class Asking:
    """Sends prompts to be sampled by the same."""

    def __init__(self, by: SampledBy) -> None:
        self._by = by
        self._sent: Counter[str] = Counter()

    def prompts(self, prompts: Sequence[str]) -> list[AskedPrompt]:
        asked = []
        for prompt in prompts:
            asked.append(AskedPrompt(prompt, self._by, self._sent[prompt]))
            self._sent[prompt] += 1
        return asked


class Gathered:
    """In an engine's place while OpenRLHF's loop hands prompts out to several by their load."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._key = engine, uuid.uuid4().hex
        self.calls: list[dict[str, Any]] = []
        self.get_num_unfinished_requests = engine.get_num_unfinished_requests
        self.generate_responses = SimpleNamespace(remote=lambda **call: self.calls.append(call))

    def ask(self) -> ray.ObjectRef:
        """Sends the calls; what is returned has arrived when the engine has begun with them."""
        return self._engine.ask.remote(self._key, self.calls)

    def answers(self, most: int) -> list[ray.ObjectRef]:
        """Responses to all calls, one or more, which the engine has begun with, in messages of about as many calls
        each: those that end first in the first, and so on. To be called once.

        Args:
            most: messages, 1 or more.
        """
        number = min(most, len(self.calls))
        ends = [len(self.calls) * place // number for place in range(number + 1)]
        return [self._engine.responses.remote(self._key, end - start) for start, end in pairwise(ends)]


class Begun:
    """At the engine's end: the calls that came together, until they are answered."""

    def __init__(self) -> None:
        self._messages: dict[str, _Calls] = {}

    async def begin(self, key: str, respond: Respond, calls: Sequence[dict[str, Any]]) -> None:
        self._messages[key] = _Calls(respond, calls)
        for _ in range(ROUNDS):
            await together()

    async def take(self, key: str, number: int) -> list[Any]:
        """Responses to the calls of a message that end next, so many."""
        calls = self._messages[key]
        try:
            return await calls.next(number)
        finally:
            if not calls.left:
                self._messages.pop(key, None)


class _Calls:
    """Of one message, as they end."""

    def __init__(self, respond: Respond, calls: Sequence[dict[str, Any]]) -> None:
        async def answer(call: dict[str, Any]) -> list[Any]:  # what is wrong with one is told to who takes it
            return await respond(**call)

        self.left = len(calls)
        self._ended: asyncio.Queue[asyncio.Task[list[Any]]] = asyncio.Queue()
        self._turn = asyncio.Lock()  # who asked first gets the first
        self._under_way = [asyncio.create_task(answer(call)) for call in calls]
        for task in self._under_way:
            task.add_done_callback(self._ended.put_nowait)

    async def next(self, number: int) -> list[Any]:
        """Raises at once what one of them raised: it ends the run."""
        responses = []
        async with self._turn:
            self.left -= number
            for _ in range(number):
                responses += (await self._ended.get()).result()
        return responses


async def together() -> None:
    """Whatever else can go on in this actor goes on first. Requests that are prepared one after the other, and then
    wait here, come to the engine at once; it would begin with the first of them, alone.
    """
    await asyncio.sleep(0)
