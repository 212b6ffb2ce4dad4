"""Requests of two training steps in one batch of the engine, through the rollout actor: each keeps its own rule."""

from __future__ import annotations

import asyncio
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from skd_plugin.core.trace import Trace
from tests.conftest import MAX_LEN
from tests.rules import make_rule

pytestmark = pytest.mark.engine

PROMPTS = ["one and two", "a + b", "one and two"]
SAMPLES = 3


class OneBatch:
    """Takes the place of vLLM's asynchronous engine: it begins when so many requests are there, with all of them."""

    def __init__(self, llm: Any, requests: int) -> None:
        self._llm, self._requests = llm, requests
        self._waiting: list[tuple[Any, Any, asyncio.Future[Any]]] = []

    async def generate(self, read_ids: list[int], sampling_params: Any) -> Any:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((read_ids, sampling_params, done))
        if len(self._waiting) == self._requests:
            ids, params, waiting = zip(*self._waiting, strict=True)
            outputs = self._llm.generate([{"prompt_token_ids": i} for i in ids], list(params), use_tqdm=False)
            for one, output in zip(waiting, outputs, strict=True):
                one.set_result(output)
        return await done

    async def take(self, trace_id: int) -> Trace:
        return self._llm.collective_rpc("take_traces", args=([trace_id],))[0][0].trace()


class Sent(NamedTuple):
    """In place of `SentOnce`: there is no Ray."""

    tokenizer: Any

    async def value(self) -> Any:
        return self.tokenizer


@pytest.fixture
def respond(engine, monkeypatch: pytest.MonkeyPatch):
    """`respond(asked)`: the responses to these prompts, sampled in one batch by OpenRLHF's executor and our actor."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from vllm import SamplingParams

    from skd_plugin.host import rollout_actor
    from skd_plugin.host.trace_store import TRACE_KEY
    from skd_plugin.host.turns import TracingExecutor

    monkeypatch.setattr(rollout_actor, "StoredTrace", SimpleNamespace(put=lambda trace, _: trace))
    offline = engine(4)

    def run(asked: list[Any]) -> list[list[Trace]]:
        actor = object.__new__(rollout_actor.SKDRollout)
        batch = OneBatch(offline._llm, len(asked) * SAMPLES)
        actor.executor = TracingExecutor(SingleTurnAgentExecutor(None))
        actor.teacher_top_k, actor._draft_len, actor._max_len, actor._end_ids = 8, 4, MAX_LEN, ()
        actor._tokenizer, actor._trace_ids, actor._traces = offline._tokenizer, count(), batch
        actor._teacher_tokenizer, actor._teacher = offline._tokenizer, 0
        monkeypatch.setattr(rollout_actor.HostRollout, "generate", lambda _, ids, params: batch.generate(ids, params))

        async def all_of_them() -> Any:
            known = {
                "label": "",
                "sampling_params": SamplingParams(max_tokens=24),
                "max_length": MAX_LEN,
                "hf_tokenizer": Sent(offline._tokenizer),
                "images": None,
            }
            calls = (actor.generate_responses(prompt=one, num_samples=SAMPLES, **known) for one in asked)
            return await asyncio.gather(*calls)

        return [[response[TRACE_KEY] for response in responses] for responses in asyncio.run(all_of_them())]

    return run


def test_requests_of_two_steps_in_one_batch_are_those_of_each_step_alone(respond) -> None:
    from skd_plugin.host.asked import Asking, SampledBy

    steps = [SampledBy(make_rule(top_k=2), seed=1), SampledBy(make_rule(top_k=9, teacher_temperature=0.0), seed=1)]
    asked = [Asking(by).prompts(PROMPTS) for by in steps]

    def tokens(traces: list[list[Trace]]) -> list[list[list[int]]]:
        return [[trace.response_ids.tolist() for trace in of_one] for of_one in traces]

    first, second = (tokens(respond(of_step)) for of_step in asked)
    together = tokens(respond([*asked[0], *asked[1]]))
    assert together == first + second
    assert all(one != other for one, other in zip(first, second, strict=True)), "the rules make no difference"
    assert len({tuple(ids) for of_one in first for ids in of_one}) == len(PROMPTS) * SAMPLES, "two have one seed"
