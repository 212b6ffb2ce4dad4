"""OpenRLHF's rollout actor with an SKD engine in it. Any executor, single or multi-turn, runs unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.trainer.ray import vllm_engine
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

from skd_plugin import trust
from skd_plugin.config.host_rules import IMAGES, NO_REWARD
from skd_plugin.core.trace import Trace
from skd_plugin.engine.arguments import EngineDescription, EngineSpec
from skd_plugin.engine.request import ending_at, finish_request, prepare_request, prompt_of_tokens
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.engine.set_up import set_up_skd
from skd_plugin.host.asked import AskedPrompt, Begun, SampledBy, together
from skd_plugin.host.garbage import keep_what_is_there, look_less_often
from skd_plugin.host.rewards import RewardedExecutor, TaskRewards
from skd_plugin.host.sent_once import SentOnce
from skd_plugin.host.teacher_prompts import teachers_ids
from skd_plugin.host.trace_store import TRACE_KEY, StoredTrace
from skd_plugin.host.turns import TracingExecutor
from skd_plugin.host.weight_sync import WORKER_EXTENSION_CLS, Bucket
from skd_plugin.models import common_vocab_size, engine_end_ids, load_tokenizer, response_text
from skd_plugin.seams import plain_class, rebind
from skd_plugin.served.probe import probe
from skd_plugin.served.teacher import ServedTeacher, Server
from skd_plugin.tasks import reward
from skd_plugin.tasks.label import AS_THE_RUN, Sampling

ENGINE_WATCH_S = 1.0  # how often a waiting call looks whether the engine still lives

HostRollout = plain_class(RolloutRayActor)


class SKDRollout(HostRollout):
    _elsewhere: ServedTeacher | None = None  # the teacher, where it is not in the engine
    _end_ids: tuple[int, ...] = ()  # of the spec

    async def __init__(
        self,
        *args: Any,
        spec: EngineSpec,
        reward_timeout_s: float,
        teacher: int = 0,
        server: Server | None = None,
        remote_rm_url: Any = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: what OpenRLHF's `create_vllm_engines` gives.
            teacher: which of the run's it is.
            server: of a teacher that is elsewhere.
        """
        for unread in ("logprobs_mode", "max_logprobs"):  # the traces say more
            kwargs.pop(unread, None)
        trust.close_transformers()
        set_up_skd()
        rebind(vllm_engine, "TokensPrompt", prompt_of_tokens)  # OpenRLHF's `generate` names it
        sources = [remote_rm_url] if isinstance(remote_rm_url, str) else remote_rm_url or []
        of_tasks, unrewarded = sources == [reward.__file__], sources in ([], [NO_REWARD])
        kwargs["worker_extension_cls"] = WORKER_EXTENSION_CLS
        own = None if of_tasks or unrewarded else remote_rm_url
        self._teacher_tokenizer, self._max_len = load_tokenizer(spec.teacher, "teacher"), spec.max_len
        if server is not None:
            vocab = common_vocab_size(spec.teacher, spec.student)
            await asyncio.to_thread(probe, server, self._teacher_tokenizer, vocab, spec.max_len)
            self._elsewhere = ServedTeacher(server, vocab)
        await super().__init__(*args, remote_rm_url=own, **spec.arguments(kwargs))
        self._tokenizer = load_tokenizer(spec.student, "student")
        self._stops = engine_end_ids(spec.teacher, self._teacher_tokenizer, self._tokenizer)
        executor: AgentExecutorBase = self.executor
        if of_tasks and isinstance(executor, SingleTurnAgentExecutor):  # an agent says what its response is worth
            text_of = partial(response_text, self._tokenizer, end_ids=self._stops)
            executor = TaskRewards(executor, text_of, reward_timeout_s)
        if not unrewarded:
            executor = RewardedExecutor(
                executor, reward_timeout_s, kwargs.get("agent_func_path") or ", ".join(sources)
            )
        self.executor = TracingExecutor(executor)
        self.teacher_top_k, self._teacher = spec.teacher_top_k, teacher
        self._draft_len = None if spec.draft_len_auto else spec.draft_len
        self._end_ids = spec.end_ids
        self._traces = _TraceFetcher(self.llm)
        self._trace_ids = count()
        self._student_version = 0
        self._begun = Begun()
        keep_what_is_there()
        look_less_often()

    async def describe_skd(self) -> EngineDescription:
        description = (await call_worker(self.llm, "describe_skd"))[0]
        return {**description, "teacher_place": self._teacher}

    async def receive_student(
        self, bucket: Bucket, ipc_handles: dict[str, Any] | None = None, into_teacher: bool = False
    ) -> None:
        pieces = (bucket.names, bucket.shapes, bucket.dtype, ipc_handles, into_teacher)
        await call_worker(self.llm, "receive_student", *pieces)

    async def student_is(self, version: int) -> None:
        await call_worker(self.llm, "student_is", version)
        self._student_version = version

    def student_version(self) -> int:
        """Updates that the student in the engine has had."""
        return self._student_version

    async def take_seconds(self) -> dict[str, float]:
        """That went to each part of the engine's work since the last call."""
        return (await call_worker(self.llm, "take_seconds"))[0]

    async def init_process_group(self, *args: Any, **kwargs: Any) -> None:
        await while_alive(self.llm, super().init_process_group(*args, **kwargs))

    async def reset_prefix_cache(self) -> None:
        await while_alive(self.llm, super().reset_prefix_cache())

    async def sleep(self, level: int = 1) -> None:
        """Raises ValueError for level 2, which throws weights away: the trainer would send the student's again, but
        nobody the teacher's.
        """
        if level != 1:
            raise ValueError(
                f"the engine was sent to sleep at level {level}, at which its teacher would be lost; use 1"
            )
        await while_alive(self.llm, super().sleep(level=level))

    async def wake_up(self, tags: list[str] | None = None) -> None:
        await while_alive(self.llm, super().wake_up(tags=tags))

    async def pause_generation(self) -> None:
        await while_alive(self.llm, super().pause_generation())

    async def resume_generation(self) -> None:
        await while_alive(self.llm, super().resume_generation())

    async def ask(self, key: str, calls: Sequence[dict[str, Any]]) -> None:
        """Begins with the responses to prompts; `calls` are arguments of `generate_responses`."""
        await self._begun.begin(key, self.generate_responses, calls)

    async def responses(self, key: str, prompts: int) -> list[dict[str, Any]]:
        """To so many of the prompts that came with this key: those that end next."""
        return await self._begun.take(key, prompts)

    async def generate_responses(
        self, prompt: AskedPrompt, *, num_samples: int, hf_tokenizer: SentOnce, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """OpenRLHF's, of one prompt, by a call for each response, so that it has its number. The traces stay on this
        node, and the responses refer to them.
        """
        one, known = super().generate_responses, {**kwargs, "hf_tokenizer": await hf_tokenizer.value()}
        calls = [one(prompt=sample, num_samples=1, **known) for sample in prompt.samples(num_samples)]
        responses = [response for (response,) in await asyncio.gather(*calls)]
        for response in responses:
            response[TRACE_KEY] = StoredTrace.put(response[TRACE_KEY], self._draft_len)
        return responses

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling_params: Any,
        multi_modal_data: Any = None,
        *,
        by: SampledBy,
        seed: int,
        reference: str | None = None,
        own: Sampling = AS_THE_RUN,
        prompt: str = "",
    ) -> Any:
        """One response.

        Args:
            seed: of its own random stream.
            reference: takes its place where the rule chooses so.
            own: what the prompt's task has in place of the rule's.
            prompt: the sample's; of a `PairedPrompt` the teacher reads its own.
        """
        if multi_modal_data:
            raise ValueError(f"a prompt has an image: {IMAGES}")
        limit = min(sampling_params.max_tokens, own.max_new_tokens or sampling_params.max_tokens)
        own_ids = teachers_ids(prompt, prompt_token_ids, self._tokenizer, self._teacher_tokenizer)
        read_ids = list(prompt_token_ids if own_ids is None else own_ids)  # by the teacher
        if own_ids is not None:
            limit = min(limit, self._max_len - len(read_ids))  # where the student's sequence would have more room
            if limit < 1:
                raise ValueError(
                    f"the teacher's prompt has come to {len(read_ids)} tokens, which leaves no room for a "
                    "response; raise skd.teacher.prompt.max_len"
                )
        limit = by.rule.limit(limit)
        if self._elsewhere is not None:
            sampling_params = ending_at(sampling_params, self._stops)
        request = prepare_request(
            prompt_token_ids,
            by.rule.with_top_k(own.top_k),
            sampling_params,
            self._tokenizer,
            trace_id=next(self._trace_ids),
            seed=seed,
            choice_seed=by.seed,
            max_new_tokens=limit,
            reference=reference,
            teacher_ids=read_ids if self._elsewhere is None else None,
            end_ids=self._end_ids,
            given_ids=await self._written_elsewhere(read_ids, by.rule, limit, seed),
        )
        await together()
        try:
            output = await super().generate(request.read_ids, request.sampling_params)
        except BaseException:  # an executor that gives up cancels this call, and vLLM then aborts the request
            self._traces.abandon(request.params.trace_id)
            raise
        trace = await self._traces.take(request.params.trace_id)
        trace = replace(trace, teacher=torch.full_like(trace.source, self._teacher))
        sample = finish_request(request, output.outputs[0], trace, self._tokenizer)
        if self._elsewhere is not None:
            sample = replace(sample, trace=await self._elsewhere.trace_of(read_ids, sample.trace))
        output.outputs[0].token_ids, output.outputs[0].text = sample.trace.response_ids.tolist(), sample.text
        if sampling_params.logprobs is not None:  # OpenRLHF's multi-turn executor reads them
            logp = zip(output.outputs[0].token_ids, sample.trace.sampled_logp.tolist(), strict=True)
            output.outputs[0].logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in logp]
        output.skd_trace = sample.trace
        return output

    async def _written_elsewhere(
        self, prompt_ids: list[int], rule: SamplingRule, limit: int, seed: int
    ) -> list[int] | None:
        """The teacher's response, where the rule has its text alone, as in an evaluation of it."""
        if self._elsewhere is None or not rule.is_teachers:
            return None
        return await self._elsewhere.write(prompt_ids, rule.settings, limit, seed, sorted(self._stops))


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
        self._abandoned: list[int] = []
        self._turn = asyncio.Lock()

    def abandon(self, trace_id: int) -> None:
        """A trace that nobody will ask for; it is fetched with the next one and thrown away."""
        self._abandoned.append(trace_id)

    async def take(self, trace_id: int) -> Trace:
        future = self._waiting[trace_id] = asyncio.get_running_loop().create_future()
        async with self._turn:
            if not future.done():
                batch, self._waiting = self._waiting, {}
                abandoned, self._abandoned = self._abandoned, []
                records = (await call_worker(self._llm, "take_traces", [*batch, *abandoned]))[0]
                for waiter, record in zip(batch.values(), records, strict=False):  # the abandoned ones come last
                    waiter.set_result(record.trace())
        return future.result()
