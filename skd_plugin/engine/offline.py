"""One vLLM engine that holds the teacher (its model) and the student (its draft model)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from skd_plugin.config.context import context_needed
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Trace
from skd_plugin.engine.references import is_chosen, reference_ids
from skd_plugin.engine.request_table import RequestParams
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.models import load_tokenizer

WORKER_CLS = "skd_plugin.engine.worker.SKDWorker"
CPU_CACHE_BYTES = 1 << 30  # key-value cache of an engine on a CPU
SCHEDULER_CLS = "skd_plugin.engine.scheduler.SKDScheduler"


@dataclass(frozen=True)
class Sample:
    """A finished response."""

    prompt_ids: list[int]
    trace: Trace
    text: str
    finish: str  # "stop" or "length"


def engine_arguments(
    teacher: str,
    student: str,
    draft_len: int,
    max_len: int,
    num_teacher_entries: int,
    loss_temperature: float = 1.0,
    teacher_hidden: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """Arguments for vLLM's EngineArgs that make an SKD engine.

    Args:
        draft_len: tokens that the student proposes before the teacher looks (gamma).
        max_len: longest sequence in tokens, prompt and response.
        num_teacher_entries: most probable teacher tokens returned for each response token.
        loss_temperature: tau of the loss; the mass of all other tokens is also recorded at it.
        teacher_hidden: return the teacher's last hidden state of each response token, too.
    """
    from skd_plugin.engine.vocabulary import allow_padding

    # Read by vLLM when it chooses a model runner, in whichever process that happens.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    allow_padding()
    arguments = dict(
        model=teacher,
        speculative_config={
            "method": "draft_model",
            "model": student,
            "num_speculative_tokens": draft_len,
            "draft_sample_method": "probabilistic",
        },
        worker_cls=WORKER_CLS,
        scheduler_cls=SCHEDULER_CLS,
        additional_config={
            "skd_teacher_entries": num_teacher_entries,
            "skd_loss_temperature": loss_temperature,
            "skd_teacher_hidden": teacher_hidden,
        },
        async_scheduling=False,
        max_model_len=context_needed(max_len, draft_len),
    )
    return arguments | machine_arguments() | others


def set_vllm_up() -> None:
    """For an engine in this process, without Ray. vLLM reads it when it is imported, so that this comes before."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def machine_arguments() -> dict[str, Any]:
    """Arguments of any engine of ours on this machine."""
    if torch.cuda.is_available():
        return dict(dtype="bfloat16", enable_prefix_caching=True)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return dict(dtype="float32", enable_prefix_caching=True, enforce_eager=True, kv_cache_memory_bytes=CPU_CACHE_BYTES)


def recipe_arguments(options: Mapping[str, Any], *, cpu: bool) -> dict[str, Any]:
    """What the host would pass to its engines, of its own options by their dotted names; `skd.vllm` wins over it."""
    arguments = {
        "tensor_parallel_size": options["vllm.tensor_parallel_size"],
        "enforce_eager": options["vllm.enforce_eager"],
        "seed": options["train.seed"],
        "trust_remote_code": True,
    }
    if not cpu:
        arguments["gpu_memory_utilization"] = options["vllm.gpu_memory_utilization"]
    return arguments


def end_tokens(tokenizer: Any) -> list[int]:
    """The end token that a tokenizer knows, if it knows one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def vllm_sampling_params(params: RequestParams, max_new_tokens: int, student_end: list[int]) -> Any:
    """SamplingParams of one request; the forced end of the prompt takes one more output token.

    A reference ends where it ends, or is cut at max_new_tokens like any response.

    vLLM's temperature is 1 whatever the models' temperatures are: SKD's sampler has its own. vLLM stops at the
    teacher's end token by itself; the student's may be another one of the same vocabulary.
    """
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0,
        max_tokens=response_limit(params, max_new_tokens) + 1,
        stop_token_ids=student_end,
        extra_args=params.to_extra_args(),
    )


def response_limit(params: RequestParams, max_new_tokens: int) -> int:
    return max_new_tokens if params.forced_ids is None else min(len(params.forced_ids), max_new_tokens)


# Sampling parameters of vLLM that SKD's sampler does not apply, with the values at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "prompt_logprobs": (None,),
}


def refuse_unsupported(sampling_params: Any) -> None:
    """Raises ValueError for a sampling parameter that would silently do nothing in an SKD engine."""
    for name, neutral in NEUTRAL.items():
        value = getattr(sampling_params, name)
        if value not in neutral:
            raise ValueError(
                f"sampling parameter {name} = {value!r} has no effect in an SKD engine: student and teacher have "
                "their own settings: use skd.rollout.student_temperature, student_top_p, teacher_temperature, ..."
            )


def split_prompt(prompt_ids: Sequence[int]) -> list[int]:
    """What the engine is given to read: the prompt without its last token, which is forced as the first output.

    Raises:
        ValueError: the prompt is shorter than two tokens.
    """
    if len(prompt_ids) < 2:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} token(s); SKD needs at least 2, because the student proposes the first "
            "response token from the prompt's last one. Begin prompts with a BOS token or a template."
        )
    return list(prompt_ids[:-1])


class SKDEngine:
    """Offline engine: prompts in, traces out. Runs in this process, without Ray."""

    def __init__(self, **arguments: Any) -> None:
        set_vllm_up()
        from vllm import LLM

        self._llm = LLM(disable_log_stats=True, **arguments)
        self._trace_ids = count()
        self.description = self._llm.collective_rpc("describe_skd")[0]
        student = arguments["speculative_config"]["model"]
        self._tokenizer = load_tokenizer(student, "student")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rule: SamplingRule | Sequence[SamplingRule],
        max_new_tokens: int | Sequence[int],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        texts: Sequence[str | None] | None = None,
        progress: bool = False,
    ) -> list[Sample]:
        """One response a prompt. The i-th request's random stream is seeds[i], by default derived from (seed, i).

        Args:
            texts: the prompts' references, for a rule that asks for them; which prompts these are depends on `seed`.
        """
        rules = [rule] * len(prompts) if isinstance(rule, SamplingRule) else list(rule)
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        seeds = [derive_seed(seed, index) for index in range(len(prompts))] if seeds is None else seeds
        trace_ids = [next(self._trace_ids) for _ in prompts]
        params = [
            r.request(prompt, trace_id, request_seed, self._forced_ids(r, prompt, text, seed))
            for r, prompt, text, trace_id, request_seed in zip(
                rules, prompts, texts or [None] * len(prompts), trace_ids, seeds, strict=True
            )
        ]
        end = end_tokens(self._tokenizer)
        outputs = self._llm.generate(
            [{"prompt_token_ids": split_prompt(prompt)} for prompt in prompts],
            [vllm_sampling_params(p, limit, end) for p, limit in zip(params, limits, strict=True)],
            use_tqdm=progress,
        )
        traces = self._llm.collective_rpc("take_traces", args=([p.trace_id for p in params],))[0]
        return list(self._samples(prompts, outputs, traces))

    def _forced_ids(self, rule: SamplingRule, prompt: Sequence[int], text: str | None, seed: int) -> list[int] | None:
        if not is_chosen(rule.reference_share, seed, prompt):
            return None
        return reference_ids(text, self._tokenizer, self._tokenizer.decode(list(prompt)))

    def decode(self, ids: list[int]) -> str:
        """Text of a response, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def load_student(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """New weights of the student, by their Hugging Face names."""
        self._llm.collective_rpc("load_student", args=(weights,))
        self._llm.reset_prefix_cache()

    def _samples(self, prompts: Sequence, outputs: list, traces: list[Trace]) -> Iterator[Sample]:
        for prompt, output, trace in zip(prompts, outputs, traces, strict=True):
            completion = output.outputs[0]
            response = list(completion.token_ids)[1:]
            trace = trace.slice(0, len(response))
            if trace.response_ids.tolist() != response:
                raise RuntimeError(f"the engine emitted {response} but its trace says {trace.response_ids.tolist()}")
            yield Sample(list(prompt), trace, self.decode(response), completion.finish_reason)
