"""A request before and after the engine: what vLLM is asked, what is refused, and the response that is left."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.engine.references import MissingReference
from skd_plugin.engine.request import (
    FORM,
    HONOURED,
    NEUTRAL,
    RequestParams,
    Sample,
    finish_request,
    refuse_unsupported,
)
from tests.requests import Letters, make_request
from tests.rules import make_rule
from tests.traces import trace_of

REFERENCES = make_rule(top_k=3, reference_share=1.0)


def test_request_carries_the_rule() -> None:
    settings = SamplingSettings(7, top_k_decay_len=30, write_back=False)
    rule = make_rule(top_k=7, top_k_decay_len=30, write_back=False)
    params = make_request([5, 6, 9], rule, trace_id=3, seed=11).params
    assert (params.prompt_len, params.first_token, params.trace_id, params.seed) == (3, 9, 3, 11)
    assert params.settings == settings and params.forced_ids is None


def test_parameters_survive_the_way_to_the_worker() -> None:
    params = make_request([5, 6, 9], REFERENCES, reference="ab").params
    carried = json.loads(json.dumps(params.to_extra_args()))  # plain values all the way
    assert carried["skd"]["forced_ids"] == [97, 98, 2]
    assert RequestParams.from_extra_args(carried) == params


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_a_request_of_another_maker_is_refused(extra_args: dict | None) -> None:
    with pytest.raises(KeyError, match="only requests that come through skd_plugin"):
        RequestParams.from_extra_args(extra_args)


def test_prompt_is_read_without_its_last_token() -> None:
    request = make_request([4, 5, 6])
    assert request.read_ids == [4, 5] and request.sampling_params.max_tokens == 8 + 1
    with pytest.raises(ValueError, match="at least 2"):
        make_request([4])


def test_a_reference_is_asked_for_as_far_as_it_goes() -> None:
    short, long = (make_request([4, 5], REFERENCES, reference="ab" * n, max_new_tokens=4) for n in (1, 9))
    assert (short.sampling_params.max_tokens, long.sampling_params.max_tokens) == (3 + 1, 4 + 1)
    with pytest.raises(MissingReference, match="this one has none: 'xy'"):
        make_request([ord("x"), ord("y")], REFERENCES)


def test_end_tokens_of_both_the_caller_and_the_student() -> None:
    given = SamplingParams(stop_token_ids=[7])
    assert make_request([4, 5], sampling_params=given).sampling_params.stop_token_ids == [7, 2]


def test_what_openrlhf_passes_is_fine() -> None:
    refuse_unsupported(
        SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=8, min_tokens=1, skip_special_tokens=False)
    )
    refuse_unsupported(SamplingParams(stop=["\n"], max_tokens=4))


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3, 4]},
        {"n": 2},
        {"prompt_logprobs": 1},
        {"min_tokens": 3},
        {"seed": 3},
        {"ignore_eos": True},
        {"logprobs": 5},
        {"extra_args": {"a": 1}},
        {"spaces_between_special_tokens": False},
    ],
    ids=lambda given: next(iter(given)),
)
def test_parameter_without_effect_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))} = .* has no effect in an SKD engine"):
        make_request([4, 5], sampling_params=SamplingParams(**given))


def test_every_parameter_of_vllm_is_honoured_or_refused() -> None:
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields == NEUTRAL.keys() | HONOURED | FORM
    assert not NEUTRAL.keys() & HONOURED and not FORM & (NEUTRAL.keys() | HONOURED)
    default = SamplingParams()
    assert all(getattr(default, name) in values for name, values in NEUTRAL.items())


def finished(text: str, stop: str | None = None, trace: str | None = None, **params: Any) -> Sample:
    """The response that is left of `text`, as vLLM gives it."""
    ids = [ord(char) for char in text]
    request = make_request([4, 5], sampling_params=SamplingParams(**params, stop=stop))
    completion = SimpleNamespace(token_ids=[5, *ids], stop_reason=stop, finish_reason="stop")
    recorded = torch.tensor([ord(char) for char in trace or text], dtype=torch.int32)
    return finish_request(request, completion, trace_of(recorded), Letters())


def test_response_is_without_the_forced_token() -> None:
    sample = finished("ab\2")
    assert sample.trace.response_ids.tolist() == [97, 98, 2] and sample.prompt_ids == [4, 5]
    assert (sample.text, sample.finish) == ("ab", "stop")
    assert finished("ab\2", skip_special_tokens=False).text == "ab\2"


def test_trace_of_what_was_cut_is_left_out() -> None:
    assert finished("ab", trace="abcd").trace.response_ids.tolist() == [97, 98]


def test_trace_of_other_tokens_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"emitted \[97, 98\], but its trace says \[97, 99\]"):
        finished("ab", trace="ac")


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("1+1=2 and", "=", "1+1="),  # a block went on after the stop string
        ("1+1=", "=", "1+1="),
        ("a==b", "==", "a=="),
        ("a=b", None, "a=b"),  # ended by a token or by its length
    ],
)
def test_a_stop_string_leaves_nothing_after_it(text: str, stop: str | None, kept: str) -> None:
    sample = finished(text, stop)
    assert "".join(map(chr, sample.trace.response_ids.tolist())) == kept
    assert sample.text == kept.removesuffix(stop or "")
    assert finished(text, stop, include_stop_str_in_output=True).text == kept


def test_the_stop_string_that_is_complete_first_counts() -> None:
    ids = [ord(char) for char in "x<end>y"]
    request = make_request([4, 5], sampling_params=SamplingParams(stop=["nd>y", "<end>", "end"]))
    completion = SimpleNamespace(token_ids=[5, *ids], stop_reason="end", finish_reason="stop")
    sample = finish_request(request, completion, trace_of(torch.tensor(ids, dtype=torch.int32)), Letters())
    assert sample.text == "x<" and sample.trace.response_ids.tolist() == ids[:5]
