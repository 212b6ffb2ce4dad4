"""Engines in this process, without Ray: prompts in, responses out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from skd_plugin.core.rng import derive_seed
from skd_plugin.engine.arguments import EngineDescription, EngineSpec
from skd_plugin.engine.request import Sample, ending_at, finish_request, prepare_request
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.engine.set_up import set_up_offline, set_up_skd
from skd_plugin.models import common_vocab_size, end_tokens, engine_end_ids, load_tokenizer, response_text
from skd_plugin.served.teacher import ServedTeacher, Server


class SKDEngine:
    """One vLLM engine that holds the teacher (its model) and the student (its draft model)."""

    def __init__(self, spec: EngineSpec) -> None:
        set_up_offline()
        set_up_skd()
        from vllm import LLM

        self._llm = LLM(disable_log_stats=True, **spec.arguments())
        self._trace_ids = count()
        self.description: EngineDescription = self._llm.collective_rpc("describe_skd")[0]
        self._tokenizer = load_tokenizer(spec.student, "student")
        self._end_ids = engine_end_ids(spec.teacher, self._llm.get_tokenizer(), self._tokenizer)
        self._joined = spec.end_ids

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rule: SamplingRule | Sequence[SamplingRule],
        max_new_tokens: int | Sequence[int],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        texts: Sequence[str | None] | None = None,
        teacher_prompts: Sequence[Sequence[int]] | None = None,
        sampling_params: Any = None,
        progress: bool = False,
    ) -> list[Sample]:
        """One response a prompt. The i-th request's random stream is seeds[i], by default derived from (seed, i).

        Args:
            sampling_params: vLLM's, for stop strings and further stop tokens.
            texts: the prompts' references, for a rule that asks for them; which prompts these are depends on `seed`.
            teacher_prompts: where the teacher reads others than the student.
        """
        from vllm import SamplingParams

        number, nothing = len(prompts), [None] * len(prompts)
        rules = [rule] * number if isinstance(rule, SamplingRule) else rule
        limits = [max_new_tokens] * number if isinstance(max_new_tokens, int) else max_new_tokens
        own_seeds = [derive_seed(seed, index) for index in range(number)] if seeds is None else seeds
        requests = [
            prepare_request(
                prompt,
                own_rule,
                sampling_params or SamplingParams(),
                self._tokenizer,
                trace_id=next(self._trace_ids),
                seed=own_seed,
                choice_seed=seed,
                max_new_tokens=limit,
                reference=reference,
                teacher_ids=teacher_ids,
                end_ids=self._joined,
            )
            for prompt, own_rule, limit, own_seed, reference, teacher_ids in zip(
                prompts, rules, limits, own_seeds, texts or nothing, teacher_prompts or nothing, strict=True
            )
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.read_ids} for request in requests],
            [request.sampling_params for request in requests],
            use_tqdm=progress,
        )
        records = self._llm.collective_rpc("take_traces", args=([request.params.trace_id for request in requests],))[0]
        return [
            finish_request(request, output.outputs[0], record.trace(), self._tokenizer)
            for request, output, record in zip(requests, outputs, records, strict=True)
        ]

    def take_seconds(self) -> dict[str, float]:
        """That went to each part of the engine's work since the last call."""
        return self._llm.collective_rpc("take_seconds")[0]

    def decode(self, ids: list[int]) -> str:
        """A response as checkers read it; see `response_text`."""
        return response_text(self._tokenizer, ids, self._end_ids)

    def load_student(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """New weights of the student, by their Hugging Face names."""
        self._llm.collective_rpc("load_student", args=(weights,))
        self._llm.reset_prefix_cache()


class StudentEngine(SKDEngine):
    """One vLLM engine with the student alone (`EngineSpec.alone_len`), whose texts a teacher elsewhere reads."""

    def __init__(self, spec: EngineSpec, server: Server) -> None:
        super().__init__(spec)
        self._server, self._vocab_size = server, common_vocab_size(spec.teacher, spec.student)
        teacher_tokenizer = load_tokenizer(spec.teacher, "teacher")
        self._end_ids = engine_end_ids(spec.teacher, teacher_tokenizer, self._tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *args: Any,
        teacher_prompts: Sequence[Sequence[int]] | None = None,
        sampling_params: Any = None,
        **kwargs: Any,
    ) -> list[Sample]:
        """As of an engine with both. Raises ServerError where nobody reads what has been written."""
        from vllm import SamplingParams

        params = ending_at(sampling_params or SamplingParams(), self._end_ids)
        samples = super().generate(prompts, *args, sampling_params=params, **kwargs)
        return asyncio.run(self._read(samples, teacher_prompts or prompts))

    async def _read(self, samples: Sequence[Sample], prompts: Sequence[Sequence[int]]) -> list[Sample]:
        async with ServedTeacher(self._server, self._vocab_size) as teacher:
            texts = zip(prompts, samples, strict=True)
            traces = await asyncio.gather(*(teacher.trace_of(ids, sample.trace) for ids, sample in texts))
        return [
            replace(sample, teacher_ids=list(ids), trace=trace)
            for sample, ids, trace in zip(samples, prompts, traces, strict=True)
        ]


@dataclass(frozen=True)
class PlainResponse:
    ids: list[int]  # the end token among them
    text: str  # see `response_text`
    ended: bool  # by an end token, and not by the limit


class PlainEngine:
    """The student alone in plain vLLM."""

    def __init__(self, spec: EngineSpec) -> None:
        set_up_offline()
        from vllm import LLM

        self._llm = LLM(disable_log_stats=True, **spec.plain_arguments())
        self.tokenizer = load_tokenizer(spec.student, "student")
        self._end = [*end_tokens(self.tokenizer), *spec.end_ids]
        self._end_ids = engine_end_ids(spec.student, self.tokenizer) | frozenset(spec.end_ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], seeds: Sequence[int], temperature: float
    ) -> list[PlainResponse]:
        """One response a prompt, of at most limits[i] tokens; greedy at temperature 0."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [plain_params(temperature, limit, self._end, seed) for limit, seed in zip(limits, seeds, strict=True)],
            use_tqdm=False,
        )
        completions = [output.outputs[0] for output in outputs]
        return [
            PlainResponse(
                list(completion.token_ids),
                response_text(self.tokenizer, completion.token_ids, self._end_ids),
                completion.finish_reason == "stop",
            )
            for completion in completions
        ]


def plain_params(temperature: float, limit: int, end: list[int], seed: int) -> Any:
    """vLLM's SamplingParams of one response, with a random stream of its own; greedy at temperature 0."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        max_tokens=limit,
        stop_token_ids=end,
        seed=seed % 2**63,  # torch takes no negative one
        detokenize=False,
    )
