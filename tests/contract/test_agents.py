"""Executors of users': each response has the traces of its own turns, however the engine was asked for them."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
from openrlhf.utils.agent import AgentExecutorBase, AgentInstanceBase, MultiTurnAgentExecutor
from vllm import SamplingParams

from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Trace
from skd_plugin.host.asked import AskedSample, SampledBy
from skd_plugin.host.rollout_actor import SKDRollout
from skd_plugin.host.teacher_prompts import PairedPrompt
from skd_plugin.host.turns import TracingExecutor, UnderWay
from skd_plugin.tasks.label import AS_THE_RUN, Label, Sampling
from tests.contract.test_openrlhf import _action_ids, _Tokenizer
from tests.rules import make_rule
from tests.traces import trace_of

MAX_TOKENS = 8
BY = SampledBy(make_rule(top_k=1), seed=0)
OF_THE_NEXT_STEP = SampledBy(make_rule(top_k=2), seed=1)


class Engine:
    """Answers a prompt of n tokens with three, after n turns of the loop; later ones may overtake.

    The trace says which call it was of, by its teacher's log-probability.
    """

    teacher_top_k = 1

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.asked: list[tuple[SampledBy, int]] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.traces: list[weakref.ref[Trace]] = []

    async def generate(
        self, prompt_token_ids: list[int], sampling_params: Any, *, by: SampledBy, seed: int, **_: Any
    ) -> Any:
        call = len(self.prompts)
        self.prompts.append(list(prompt_token_ids))
        self.asked.append((by, seed))
        self.loops.add(asyncio.get_running_loop())
        for _ in range(len(prompt_token_ids)):
            await asyncio.sleep(0)
        ids = [prompt_token_ids[0] + 1, len(prompt_token_ids), 7]
        trace = trace_of(torch.tensor(ids), teacher_logp=torch.full((3,), -float(call)))
        self.traces.append(weakref.ref(trace))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)], skd_trace=trace)


class Server(AgentExecutorBase):
    """Asks, in a thread and a loop of its own, the engine of its first sample for all of them, two turns each."""

    def __init__(self, change: Callable[[list[int]], list[int]] = list) -> None:
        """`change`: of the ids of a response."""
        self._change = change
        self._engine: Any = None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def execute(self, prompt: str, llm_engine: Any, **_: Any) -> dict[str, Any]:
        self._engine = self._engine or llm_engine
        ids, ranges = [ord(char) for char in prompt], []
        for feedback in ([0], []):
            answer = asyncio.run_coroutine_threadsafe(self._ask(list(ids)), self.loop)
            sampled = await asyncio.wrap_future(answer)
            ranges.append((len(ids), len(ids) + len(sampled)))
            ids += sampled + feedback
        return {"observation_tokens": self._change(ids), "action_ranges": ranges}

    async def _ask(self, ids: list[int]) -> list[int]:
        output = await self._engine.generate(ids, SamplingParams(max_tokens=MAX_TOKENS))
        return output.outputs[0].token_ids

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*args: Any) -> Server:
        made.append(Server(*args))
        return made[-1]

    yield make
    for one in made:
        one.end()


async def together(
    executor: TracingExecutor,
    engine: Engine,
    prompts: list[str],
    labels: list[str] | None = None,
    by: SampledBy | list[SampledBy] = BY,
) -> Any:
    """Responses, or errors, of samples that are under way together."""
    labels = labels or [""] * len(prompts)
    asked = list(zip(prompts, by if isinstance(by, list) else [by] * len(prompts), strict=True))
    samples = [AskedSample(*one, number=asked[:index].count(one) + 1) for index, one in enumerate(asked)]
    calls = [
        executor.execute(prompt=sample, label=label, llm_engine=engine, sampling_params=None, max_length=99)
        for sample, label in zip(samples, labels, strict=True)
    ]
    responses = await asyncio.gather(*calls, return_exceptions=True)
    assert engine.loops <= {asyncio.get_running_loop()}, "the engine was asked in another loop than its own"
    return responses


def execute(*args: Any, **kwargs: Any) -> Any:
    return asyncio.run(together(*args, **kwargs))


def turns(response: dict[str, Any], engine: Engine) -> list[int]:
    """The calls that a response's trace says it is of, by the prompts that the engine saw."""
    ids = response["observation_tokens"]
    return [engine.prompts.index(ids[:start]) for start, _ in response["action_ranges"]]


def test_an_executor_that_keeps_the_engine_of_its_first_sample(server) -> None:
    engine, executor = Engine(), TracingExecutor(server())
    prompts = ["abcdef", "bc", "cdefghijk", "d", "efg"]
    for response in execute(executor, engine, prompts):
        assert response["skd"].response_ids.tolist() == _action_ids(response)
        calls = [-float(call) for call in turns(response, engine) for _ in range(3)]
        assert response["skd"].teacher_logp.tolist() == calls
    gc.collect()
    assert not any(trace() for trace in engine.traces), "the kept engine holds on to traces of samples that are over"


def test_two_samples_of_the_same_tokens_have_a_trace_each(server) -> None:
    engine, executor = Engine(), TracingExecutor(server())
    responses = execute(executor, engine, ["abc", "abc"])
    assert {tuple(response["skd"].teacher_logp.tolist()) for response in responses} == {
        (-first,) * 3 + (-second,) * 3 for first, second in ((0.0, 2.0), (1.0, 3.0))
    }


def test_changed_tokens_are_an_error(server) -> None:
    engine, executor = Engine(), TracingExecutor(server(lambda ids: [*ids[:-1], 9]))
    for error in execute(executor, engine, ["abc", "b"]):
        assert isinstance(error, RuntimeError) and "the engine has not sampled the 3 action tokens" in str(error)
    assert not executor._under_way.turns


def test_another_tasks_settings_are_an_error(server) -> None:
    """They belong to the sample whose engine was asked."""
    labels = [Label("r", "arithmetic", "1", sampling=Sampling(top_k)).to_json() for top_k in (None, 3)]
    first, second = execute(TracingExecutor(server()), Engine(), ["abc", "b"], labels)
    assert len(first["skd"]) == 6
    assert f"sampled by {AS_THE_RUN}, where its task (skd.tasks) has {Sampling(3)}" in str(second)


def test_another_samples_prompt_of_the_teacher_is_an_error(server) -> None:
    prompts = [PairedPrompt("abc", "the teacher's"), PairedPrompt("b", "another of the teacher's")]
    first, second = execute(TracingExecutor(server()), Engine(), prompts)
    assert len(first["skd"]) == 6 and first["prompt"] is prompts[0]
    assert "the teacher read the prompt that it has for that one" in str(second)


class Single(AgentExecutorBase):
    """Asks the engine that it is given, as often as its prompt has words."""

    async def execute(self, prompt: str, llm_engine: Any, **_: Any) -> dict[str, Any]:
        ids, ranges = [ord(char) for char in prompt], []
        for _word in prompt.split():
            output = await llm_engine.generate(list(ids), SamplingParams(max_tokens=MAX_TOKENS))
            ranges.append((len(ids), len(ids) + 3))
            ids += output.outputs[0].token_ids
        return {"observation_tokens": ids, "action_ranges": ranges}


def test_samples_of_two_steps_under_way_together_keep_their_own_rules_and_seeds() -> None:
    engine = Engine()
    execute(TracingExecutor(Single()), engine, ["a", "a", "b c", "b c"], by=[BY, OF_THE_NEXT_STEP] * 2)
    together = set(zip(map(tuple, engine.prompts), engine.asked, strict=True))
    alone = set()
    for by in (BY, OF_THE_NEXT_STEP):
        execute(TracingExecutor(Single()), engine := Engine(), ["a", "b c"], by=by)
        alone |= set(zip(map(tuple, engine.prompts), engine.asked, strict=True))
    assert together == alone and len(together) == 6


def test_each_response_to_a_prompt_has_a_seed_of_its_number() -> None:
    """It does not depend on which of them asks first; a second request for the same tokens has another."""
    engine = Engine()
    execute(TracingExecutor(Single()), engine, ["a", "a", "a"])
    place = (0, crc32(str([ord("a")]).encode()))
    assert [seed for _, seed in engine.asked] == [derive_seed(*place, number) for number in (1, 2, 3)]
    under_way, sample = UnderWay(), AskedSample("a", BY)
    assert [under_way.seed(sample, [ord("a")]) for _ in range(2)] == [
        derive_seed(*place, 1),
        derive_seed(*place, 1, 1),
    ]


def test_a_kept_engine_asks_by_the_rule_of_the_samples_under_way(server) -> None:
    """Those of the next step, or of an evaluation, when the sample that it was given for is long over."""
    kept, engine = server(), Engine()
    executor = TracingExecutor(kept)

    async def two_steps() -> Any:
        await together(executor, engine, ["abc", "b"])
        engine.asked.clear()
        responses = await together(executor, engine, ["abc", "b", "b"], by=OF_THE_NEXT_STEP)
        with pytest.raises(RuntimeError, match="a sample that is over, while no other is under way"):
            await kept._engine.generate([1, 2], SamplingParams(max_tokens=MAX_TOKENS))
        return responses

    assert [len(response["skd"]) for response in asyncio.run(two_steps())] == [6, 6, 6]
    assert len(set(engine.asked)) == 6 and {by for by, _ in engine.asked} == {OF_THE_NEXT_STEP}


def test_a_kept_engine_between_samples_of_two_steps_is_an_error(server) -> None:
    first, second = execute(TracingExecutor(server()), Engine(), ["abc", "b"], by=[BY, OF_THE_NEXT_STEP])
    assert len(first["skd"]) == 6
    assert "it was sampled by the rule and the seed of another step" in str(second)


# --- log-probabilities for a correction of importance (SKDRollout.generate) ---


def test_every_turn_has_the_log_probabilities_of_who_drew_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenRLHF's multi-turn executor reads them where it corrects by importance; vLLM is asked for none."""
    from skd_plugin.host import rollout_actor

    asked: list[Any] = []
    source = torch.tensor([0, 1, 0], dtype=torch.uint8)  # the student's, the teacher's, the student's
    logp = {"student_logp": torch.tensor([-1.0, -2.0, -3.0]), "teacher_logp": torch.tensor([-4.0, -5.0, -6.0])}

    async def sample(self: Any, prompt_ids: list[int], params: Any) -> Any:
        asked.append(params)
        completion = SimpleNamespace(token_ids=[0, 65, 66, 67], stop_reason=None, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[completion])

    async def take(trace_id: int) -> Any:
        return trace_of(torch.tensor([65, 66, 67]), source=source, **logp)

    class Tokenizer(_Tokenizer):
        eos_token_id = None

    class Twice(AgentInstanceBase):
        turn = 0

        def __init__(self) -> None: ...

        async def step(self, states: dict, **_: Any) -> dict[str, Any]:
            self.turn += 1
            return {"rewards": torch.tensor(0.0), "environment_feedback": "--", "done": self.turn == 2}

    monkeypatch.setattr(rollout_actor.HostRollout, "generate", sample)
    engine = object.__new__(SKDRollout)
    engine._tokenizer, engine._trace_ids, engine.teacher_top_k = Tokenizer(), iter(range(9)), 1
    engine._traces, engine._end_ids = SimpleNamespace(take=take), ()
    engine._teacher, engine._teacher_tokenizer = 0, None

    def response(**params: Any) -> dict[str, Any]:
        call = TracingExecutor(MultiTurnAgentExecutor(Twice)).execute(
            prompt=AskedSample("ab", BY), label="", max_length=64,
            sampling_params=SamplingParams(max_tokens=MAX_TOKENS, **params),
            hf_tokenizer=Tokenizer(), llm_engine=engine, images=None,
        )  # fmt: skip
        return asyncio.run(call)

    turn, said = [-1.0, -5.0, -3.0], [0.0, 0.0]
    assert response(logprobs=1)["rollout_log_probs"] == [*said, *turn, *said, *turn, *said]
    assert response()["rollout_log_probs"] is None
    assert all(params.logprobs is None for params in asked)
