"""What the engine was asked for a sample, turn by turn, whatever executor asks: settings, seeds, and traces."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from openrlhf.utils.agent import AgentExecutorBase

from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Trace
from skd_plugin.host.asked import AskedSample, SampledBy
from skd_plugin.host.teacher_prompts import teacher_prompt
from skd_plugin.host.trace_store import TRACE_KEY
from skd_plugin.tasks.label import Label


class TracingExecutor(AgentExecutorBase):
    """Runs OpenRLHF's or the user's executor and adds the traces of all its turns, in order, to its response.

    Each sample has an engine of its own to ask, so that what it asked for is known. An executor may keep the one of
    its first sample for all that follow, as one with a server does: a response's turns are then found by their tokens.
    """

    def __init__(self, inner: AgentExecutorBase) -> None:
        self._inner = inner
        self._under_way = UnderWay()

    async def execute(self, *, prompt: AskedSample, label: Any, llm_engine: Any, **kwargs: Any) -> dict[str, Any]:
        """Called by keywords, in the actor's `generate_responses`.

        Raises:
            RuntimeError: the response has tokens that no turn accounts for, or another sample's settings.
        """
        engine = _TurnRecorder(llm_engine, prompt, Label.parse(label), self._under_way)
        with self._under_way.sample(engine):
            response = await self._inner.execute(prompt=str(prompt.prompt), label=label, llm_engine=engine, **kwargs)
            turns = [turn for turn in self._under_way.turns if turn.asked is engine]
            if not _are_all(turns, response):
                turns = self._found(response, engine)
            for turn in turns:
                self._under_way.turns.pop(turn, None)
        response["prompt"] = prompt.prompt  # with its pair, where it has one
        traces = [turn.trace for turn in turns]
        response[TRACE_KEY] = Trace.join(traces) if traces else Trace.empty(llm_engine.teacher_top_k)
        return response

    def _found(self, response: dict[str, Any], own: _TurnRecorder) -> list[_Turn]:
        """A response's turns among those of all samples: each was sampled for just what stands before its tokens."""
        turns: list[_Turn] = []
        ids = list(response["observation_tokens"])
        for start, end in response["action_ranges"]:
            found = (turn for turn in self._under_way.turns if turn not in turns and turn.is_at(ids, start, end))
            turn = next(found, None)
            if turn is None:
                raise RuntimeError(
                    f"the engine has not sampled the {end - start} action tokens (action_ranges) from {start} on of "
                    "an agent's response, or not for the tokens before them; an executor must return the engine's "
                    "token ids unchanged, and ask it with the ids that it returns"
                )
            wrong = turn.asked.differs_from(own)
            if wrong is not None:
                raise RuntimeError(
                    f"an executor asked the engine of one sample for the response of another, so {wrong}; let it ask "
                    "the llm_engine that each execute() is given, and not keep the first one"
                )
            turns.append(turn)
        return turns


class UnderWay:
    """The samples that are under way together, and what was sampled for them."""

    def __init__(self) -> None:
        self.turns: dict[_Turn, None] = {}  # in the order in which they ended
        self._samples: dict[_TurnRecorder, None] = {}  # in the order in which they began
        self._times: Counter[tuple[SampledBy, int, int]] = Counter()

    @contextmanager
    def sample(self, recorder: _TurnRecorder) -> Iterator[None]:
        """While it is open, the recorder's sample is under way."""
        self._samples[recorder] = None
        try:
            yield
        finally:
            del self._samples[recorder]
            if not self._samples:
                self.turns.clear()
                self._times.clear()

    def asked_by(self, recorder: _TurnRecorder) -> _TurnRecorder:
        """Itself, or where its sample is over, one whose sample is not: by that one's settings it is sampled.

        Raises:
            RuntimeError: none is under way.
        """
        if recorder in self._samples:
            return recorder
        if not self._samples:
            raise RuntimeError("an executor asked the engine of a sample that is over, while no other is under way")
        return next(iter(self._samples))

    def seed(self, sample: AskedSample, prompt_ids: Sequence[int]) -> int:
        """Of a sample's next request for these ids."""
        prompt_hash = crc32(str(list(prompt_ids)).encode())
        times = self._times[(sample.by, prompt_hash, sample.number)]
        self._times[(sample.by, prompt_hash, sample.number)] += 1
        return derive_seed(sample.by.seed, prompt_hash, sample.number, *([times] if times else []))


@dataclass(frozen=True, eq=False)
class _Turn:
    """What the engine sampled in one call."""

    prompt_ids: list[int]
    trace: Trace
    asked: _TurnRecorder  # by whose settings

    def is_at(self, ids: list[int], start: int, end: int) -> bool:
        """Whether it is tokens `start` to `end` of these, and was asked for with those before."""
        if (len(self.prompt_ids), len(self.trace)) != (start, end - start):
            return False
        return self.trace.response_ids.tolist() == ids[start:end] and self.prompt_ids == ids[:start]


def _are_all(turns: Sequence[_Turn], response: dict[str, Any]) -> bool:
    """Whether a response's action tokens are those of these turns, all of them, in order."""
    ids = response["observation_tokens"]
    actions = [token for start, end in response["action_ranges"] for token in ids[start:end]]
    return actions == [token for turn in turns for token in turn.trace.response_ids.tolist()]


class _TurnRecorder:
    """The engine as one sample's executor sees it, which may keep it as long as it likes."""

    def __init__(self, engine: Any, sample: AskedSample, label: Label, under_way: UnderWay) -> None:
        self._engine, self._sample, self._label, self._under_way = engine, sample, label, under_way
        self._loop = asyncio.get_running_loop()

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """May be called in another loop, as that of a server's thread: the engine is only ever asked in its own."""
        call = self._ask(*args, **kwargs)
        if asyncio.get_running_loop() is self._loop:
            return await call
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))

    async def _ask(self, prompt_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        asked = self._under_way.asked_by(self)
        sample, label = asked._sample, asked._label
        known = {
            "by": sample.by,
            "seed": self._under_way.seed(sample, prompt_token_ids),
            "reference": label.reference,
            "own": label.sampling,
            "prompt": sample.prompt,
        }
        output = await self._engine.generate(prompt_token_ids, *args, **known, **kwargs)
        self._under_way.turns[_Turn(list(prompt_token_ids), output.skd_trace, asked)] = None
        return output

    def differs_from(self, own: _TurnRecorder) -> str | None:
        """What was not as for `own` in a response to this one's sample; None: all was."""
        if self._sample.by != own._sample.by:
            return "it was sampled by the rule and the seed of another step"
        if self._label.sampling != own._label.sampling:
            return f"it was sampled by {self._label.sampling}, where its task (skd.tasks) has {own._label.sampling}"
        if teacher_prompt(self._sample.prompt) != teacher_prompt(own._sample.prompt):
            return "the teacher read the prompt that it has for that one (skd.teacher.prompt)"
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
