"""OpenRLHF's rollout actor with an SKD engine in it. Any executor, single or multi-turn, runs unchanged."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any
from zlib import crc32

from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.utils.agent import AgentExecutorBase

from skd_plugin.config.host_rules import NO_REWARD
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Trace
from skd_plugin.engine.offline import end_tokens, engine_arguments, refuse_unsupported, response_limit, split_prompt
from skd_plugin.engine.references import is_chosen, reference_ids
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.host.batch import TRACE_KEY
from skd_plugin.host.rewards import RewardedExecutor
from skd_plugin.host.weight_sync import WORKER_EXTENSION_CLS, Bucket
from skd_plugin.models import load_tokenizer
from skd_plugin.seams import plain_class
from skd_plugin.tasks.label import AS_THE_RUN, Label, Sampling

ENGINE_WATCH_S = 1.0  # how often a waiting call looks whether the engine still lives

HostRollout = plain_class(RolloutRayActor)


@dataclass(frozen=True)
class EngineSpec:
    """What an engine needs to know of the recipe."""

    teacher: str
    draft_len: int
    num_teacher_entries: int
    loss_temperature: float
    teacher_hidden: bool
    rule: SamplingRule
    seed: int
    reward_timeout_s: float
    vllm_options: dict[str, Any]


class SKDRollout(HostRollout):
    async def __init__(self, *args: Any, skd: EngineSpec, remote_rm_url: Any = None, **kwargs: Any) -> None:
        student, max_len = kwargs.pop("model"), kwargs.pop("max_model_len")
        for replaced in ("worker_extension_cls", "dtype", "enable_prefix_caching", "logprobs_mode", "max_logprobs"):
            kwargs.pop(replaced, None)
        sizes = (skd.draft_len, max_len, skd.num_teacher_entries, skd.loss_temperature, skd.teacher_hidden)
        arguments = engine_arguments(skd.teacher, student, *sizes, **skd.vllm_options)
        if arguments["dtype"] == "float32":
            kwargs.pop("gpu_memory_utilization", None)  # on CPU a share of all memory, not of a GPU's
        rewards = None if remote_rm_url in (NO_REWARD, [NO_REWARD]) else remote_rm_url
        await super().__init__(
            *args, remote_rm_url=rewards, worker_extension_cls=WORKER_EXTENSION_CLS, **{**kwargs, **arguments}
        )
        executor = RewardedExecutor(self.executor, skd.reward_timeout_s) if rewards else self.executor
        self.executor = _TracingExecutor(executor)
        self.num_teacher_entries = skd.num_teacher_entries
        self._traces = _TraceFetcher(self.llm)
        self._trace_ids = count()
        self._tokenizer = load_tokenizer(student, "student")
        self._student_end = end_tokens(self._tokenizer)
        self.set_rule(skd.rule, skd.seed)

    def set_rule(self, rule: SamplingRule, seed: int) -> None:
        """How requests are sampled from now on; the same (seed, prompt, n-th request for it) gives the same tokens."""
        self._rule, self._seed = rule, seed
        self._times_seen: Counter[int] = Counter()

    async def describe_skd(self) -> dict[str, str | int]:
        return (await call_worker(self.llm, "describe_skd"))[0]

    async def receive_student(self, bucket: Bucket, ipc_handles: dict[str, Any] | None = None) -> None:
        pieces = (bucket.names, bucket.shapes, bucket.dtype, ipc_handles)
        await call_worker(self.llm, "receive_student", *pieces)

    async def reset_prefix_cache(self) -> None:
        await while_alive(self.llm, self.llm.reset_prefix_cache())

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling_params: Any,
        multi_modal_data: Any = None,
        reference: str | None = None,
        own: Sampling = AS_THE_RUN,
    ) -> Any:
        """One response. `reference` takes its place where the rule chooses so; the others are sampled, by what the
        prompt's task has of its `own`.
        """
        if multi_modal_data:
            raise ValueError("SKD does not support image inputs: the student drafts from token ids only")
        refuse_unsupported(sampling_params)
        params = self._rule.with_top_k(own.top_k).request(
            prompt_token_ids,
            next(self._trace_ids),
            self._next_seed(prompt_token_ids),
            self._forced_ids(prompt_token_ids, reference),
        )
        engine_params = deepcopy(sampling_params)
        engine_params.min_tokens, engine_params.logprobs = 0, None
        limit = min(engine_params.max_tokens, own.max_new_tokens or engine_params.max_tokens)
        engine_params.max_tokens = response_limit(params, limit) + 1  # the forced end of the prompt
        # vLLM knows the teacher's end token; the student's may be another one of the same vocabulary.
        engine_params.stop_token_ids = [*(engine_params.stop_token_ids or ()), *self._student_end]
        engine_params.extra_args = params.to_extra_args()
        output = await super().generate(split_prompt(prompt_token_ids), engine_params)
        completion = output.outputs[0]
        completion.token_ids = self._without_overshoot(list(completion.token_ids)[1:], completion.stop_reason)
        completion.text = self._text(completion, engine_params)
        trace = (await self._traces.take(params.trace_id)).slice(0, len(completion.token_ids))
        if trace.response_ids.tolist() != completion.token_ids:
            raise RuntimeError(f"the engine emitted {completion.token_ids}, its trace says {trace.response_ids}")
        output.skd_trace = trace
        return output

    def _forced_ids(self, prompt_ids: list[int], reference: str | None) -> list[int] | None:
        if not is_chosen(self._rule.reference_share, self._seed, prompt_ids):
            return None
        return reference_ids(reference, self._tokenizer, self._tokenizer.decode(prompt_ids))

    def _next_seed(self, prompt_ids: list[int]) -> int:
        prompt_hash = crc32(str(prompt_ids).encode())
        self._times_seen[prompt_hash] += 1
        return derive_seed(self._seed, prompt_hash, self._times_seen[prompt_hash])

    def _without_overshoot(self, ids: list[int], stop_reason: Any) -> list[int]:
        """vLLM finds a stop string behind a whole block, and then cuts the text but not the tokens."""
        if not isinstance(stop_reason, str):
            return ids
        while stop_reason in self._tokenizer.decode(ids[:-1]):
            ids = ids[:-1]
        return ids

    def _text(self, completion: Any, params: Any) -> str:
        """Text of the response without the forced token, whose own text vLLM has put in front."""
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=params.skip_special_tokens)
        if isinstance(completion.stop_reason, str) and not params.include_stop_str_in_output:
            text = text[: text.rfind(completion.stop_reason)]
        return text


async def while_alive(llm: Any, call: Awaitable[Any]) -> Any:
    """Result of a call to the engine; vLLM never answers one that was under way when the engine died."""
    task = asyncio.ensure_future(call)
    while not (await asyncio.wait({task}, timeout=ENGINE_WATCH_S))[0]:
        if llm.errored:
            task.cancel()
            raise llm.dead_error
    return task.result()


async def call_worker(llm: Any, method: str, *args: Any) -> list[Any]:
    return await while_alive(llm, llm.collective_rpc(method, args=args))


class _TraceFetcher:
    """Fetches traces from the worker; requests that end while a call is under way share the next one."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._waiting: dict[int, asyncio.Future[Trace]] = {}
        self._turn = asyncio.Lock()

    async def take(self, trace_id: int) -> Trace:
        future = self._waiting[trace_id] = asyncio.get_running_loop().create_future()
        async with self._turn:
            if not future.done():
                batch, self._waiting = self._waiting, {}
                traces = (await call_worker(self._llm, "take_traces", list(batch)))[0]
                for waiter, trace in zip(batch.values(), traces, strict=True):
                    waiter.set_result(trace)
        return future.result()


class _TracingExecutor(AgentExecutorBase):
    """Runs the host's or the user's executor and adds to its response the traces of all its turns, in order."""

    def __init__(self, inner: AgentExecutorBase) -> None:
        self._inner = inner

    async def execute(self, *, prompt: str, label: Any, llm_engine: Any, **kwargs: Any) -> dict[str, Any]:
        turns = _TurnRecorder(llm_engine, Label.parse(label))
        response = await self._inner.execute(prompt=prompt, label=label, llm_engine=turns, **kwargs)
        response[TRACE_KEY] = Trace.join([turns.nothing, *turns.traces])
        return response


class _TurnRecorder:
    """The engine as one sample's executor sees it."""

    def __init__(self, engine: Any, label: Label) -> None:
        self._engine, self._label = engine, label
        self.nothing = Trace.empty(engine.num_teacher_entries)  # of an executor that asks for no token at all
        self.traces: list[Trace] = []

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        known = {"reference": self._label.reference, "own": self._label.sampling}
        output = await self._engine.generate(*args, **known, **kwargs)
        self.traces.append(output.skd_trace)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
