"""The life of a request, the same in OpenRLHF's actor and in the offline engine: prepared, sampled, finished.

vLLM reads the prompt without its last token, which SKD's sampler forces as the first output: so the student proposes
every token of the response. `finish_request` takes that token off again. The prompt that vLLM reads is the teacher's;
where the student has another one, it goes along with the request (engine/student_prompt.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.core.trace import Trace
from skd_plugin.engine.references import is_chosen, reference_ids
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.models import end_tokens

EXTRA_ARGS_KEY = "skd"  # the entry of vLLM's SamplingParams.extra_args that carries a `RequestParams`

# Sampling parameters of vLLM that SKD's sampler does not apply, with the values at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "seed": (None,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "min_tokens": (0, 1),  # a response has at least one
    "ignore_eos": (False,),
    "logprobs": (None, 1),  # 1: OpenRLHF asks for them with an importance-sampling correction; the trace has them
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None,),
    "flat_logprobs": (False,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (None,),
    "extra_args": (None,),
    "trace_decode_token_ids": (None,),
    "routed_experts_prompt_start": (0,),
}
HONOURED = frozenset(
    "stop stop_token_ids max_tokens skip_special_tokens include_stop_str_in_output skip_reading_prefix_cache".split()
)
# What a request says of the form of its output, which is always the whole one; the rest is vLLM's own bookkeeping.
FORM = frozenset("detokenize output_kind skip_clone output_text_buffer_length".split())


@dataclass(frozen=True)
class RequestParams:
    """How one request is sampled: what the engine's worker is told of it."""

    trace_id: int  # names the trace when it is fetched; unique in the engine
    prompt_len: int  # tokens of the student's prompt
    first_token: int  # last token of the teacher's prompt, forced as the first output
    seed: int  # of the request's own random stream
    settings: SamplingSettings
    forced_ids: list[int] | None = None  # a reference: every token of it is proposed and kept
    student_ids: list[int] | None = None  # the student's prompt, where it is not the teacher's
    shift: int = 0  # tokens that the teacher's prompt has more than the student's

    def to_extra_args(self) -> dict[str, Any]:
        return {EXTRA_ARGS_KEY: {**vars(self), "settings": dict(vars(self.settings))}}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestParams:
        """Raises KeyError for a request that was not made here: it would be sampled by no known rule."""
        if not extra_args or EXTRA_ARGS_KEY not in extra_args:
            raise KeyError(
                f"a request has no '{EXTRA_ARGS_KEY}' sampling arguments; an SKD engine serves only requests that "
                "come through skd_plugin.engine"
            )
        given = extra_args[EXTRA_ARGS_KEY]
        return cls(**{**given, "settings": SamplingSettings(**given["settings"])})


@dataclass(frozen=True)
class Request:
    """What vLLM is asked."""

    prompt_ids: list[int]  # the student's
    teacher_ids: list[int]  # the teacher's prompt, often the same
    params: RequestParams
    sampling_params: Any  # vLLM's SamplingParams

    @property
    def read_ids(self) -> list[int]:
        """The prompt that vLLM is given to read."""
        return self.teacher_ids[:-1]


@dataclass(frozen=True)
class Sample:
    """A finished response."""

    prompt_ids: list[int]  # the student's
    teacher_ids: list[int]  # the teacher's prompt, often the same
    trace: Trace
    text: str
    finish: str  # "stop" or "length"


def prepare_request(
    prompt_ids: Sequence[int],
    rule: SamplingRule,
    sampling_params: Any,
    tokenizer: Any,
    *,
    trace_id: int,
    seed: int,
    choice_seed: int,
    max_new_tokens: int,
    reference: str | None,
    teacher_ids: Sequence[int] | None = None,
    end_ids: Sequence[int] = (),
    given_ids: Sequence[int] | None = None,
) -> Request:
    """
    Args:
        prompt_ids: the student's.
        teacher_ids: the teacher's prompt, where it is another one.
        given_ids: the response, where it is to be read only.
        sampling_params: vLLM's; of them stay the stop strings, further stop tokens and the form of the text.
        tokenizer: the student's.
        seed: of the request's own random stream.
        choice_seed: decides, with the prompt, whether `rule` answers it by its reference; see `is_chosen`.
        max_new_tokens: length at which the response, a reference too, is cut.
        end_ids: the engine's (`EngineSpec.end_ids`).

    Raises:
        ValueError: a sampling parameter that would do nothing, or a prompt that is too short.
        MissingReference: the rule asks for a reference, and there is none.
    """
    refuse_unsupported(sampling_params)
    student, teacher = list(prompt_ids), list(prompt_ids if teacher_ids is None else teacher_ids)
    _check_prompts(student, teacher)
    forced_ids = None if given_ids is None else list(given_ids)
    if is_chosen(rule.reference_share, choice_seed, prompt_ids):
        forced_ids = reference_ids(reference, tokenizer, prompt_ids, end_ids)
    if forced_ids is not None:
        max_new_tokens = min(max_new_tokens, len(forced_ids))
    params = RequestParams(
        trace_id=trace_id,
        prompt_len=len(student),
        first_token=teacher[-1],
        seed=seed,
        settings=rule.settings,
        forced_ids=forced_ids,
        student_ids=None if student == teacher else student,
        shift=len(teacher) - len(student),
    )
    sampling_params = copy(sampling_params)  # of which nothing is changed that it shares
    sampling_params.logprobs = None
    sampling_params.detokenize = bool(sampling_params.stop)  # else no text is needed before the end
    sampling_params.output_kind = type(sampling_params.output_kind).FINAL_ONLY
    sampling_params.max_tokens = max_new_tokens + 1  # the forced token
    # vLLM stops at the teacher's end token by itself; the student's may be another one of the same vocabulary.
    sampling_params.stop_token_ids = [*(sampling_params.stop_token_ids or ()), *end_tokens(tokenizer)]
    sampling_params.extra_args = params.to_extra_args()
    return Request(student, teacher, params, sampling_params)


def ending_at(sampling_params: Any, end_ids: Iterable[int]) -> Any:
    """vLLM's, with further tokens that end a response."""
    sampling_params = copy(sampling_params)
    sampling_params.stop_token_ids = [*(sampling_params.stop_token_ids or ()), *sorted(end_ids)]
    return sampling_params


def prompt_of_tokens(prompt_token_ids: list[int]) -> dict[str, Any]:
    """A prompt that says of itself that it is tokens and nothing else (`vllm.inputs.tokens_input`). In any other vLLM
    looks for text and images, in a thread of its own.
    """
    return {"type": "token", "prompt_token_ids": prompt_token_ids}


def _check_prompts(student: list[int], teacher: list[int]) -> None:
    for ids in (student, teacher):
        if len(ids) < 2:
            raise ValueError(
                f"the prompt has {len(ids)} token(s); SKD needs at least 2, because the student proposes the first "
                "response token from the prompt's last one. Begin prompts with a BOS token or a template."
            )
    if len(student) > len(teacher):
        raise ValueError(
            f"the student's prompt has {len(student)} tokens, the teacher's {len(teacher)}: in the engine the student "
            "lives in the teacher's places, so its prompt must not be the longer one. Give the teacher the same "
            "prompt, or more to read."
        )


def refuse_unsupported(sampling_params: Any) -> None:
    """Raises ValueError for a sampling parameter that would silently do nothing in an SKD engine."""
    for name, neutral in NEUTRAL.items():
        value = getattr(sampling_params, name)
        if value not in neutral:
            raise ValueError(
                f"sampling parameter {name} = {value!r} has no effect in an SKD engine: student and teacher have "
                "their own settings: use skd.rollout.student_temperature, student_top_p, teacher_temperature, ..."
            )


def finish_request(request: Request, completion: Any, trace: Trace, tokenizer: Any) -> Sample:
    """
    Args:
        completion: vLLM's CompletionOutput.
        trace: what the worker recorded; it may go on where vLLM has cut the response.

    Raises:
        RuntimeError: the trace is of other tokens than vLLM's.
    """
    params = request.sampling_params

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)

    ids = list(completion.token_ids)[1:]
    text = text_of(ids)
    if isinstance(completion.stop_reason, str):
        # The string was found after a whole block; what the block has beyond it goes.
        while first_stop(shorter := text_of(ids[:-1]), params.stop):
            ids, text = ids[:-1], shorter
        found = first_stop(text, params.stop)
        if found is not None:
            text = text[: found.end if params.include_stop_str_in_output else found.start]
    trace = trace.slice(0, len(ids))
    if trace.response_ids.tolist() != ids:
        raise RuntimeError(f"the engine emitted {ids}, but its trace says {trace.response_ids.tolist()}")
    return Sample(request.prompt_ids, request.teacher_ids, trace, text, completion.finish_reason)


class FoundStop(NamedTuple):
    string: str
    start: int  # place in the text
    end: int


def first_stop(text: str, stops: Sequence[str]) -> FoundStop | None:
    """The stop string that is complete first; None where there is none in the text."""
    found = [FoundStop(stop, place, place + len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, key=lambda stop: stop.end, default=None)
