"""What is refused before it would silently do nothing."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from skd_plugin.engine.offline import refuse_unsupported, split_prompt


def test_what_the_host_passes_is_fine():
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
    ],
    ids=lambda given: next(iter(given)),
)
def test_parameter_without_effect_is_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} = .* has no effect in an SKD engine"):
        refuse_unsupported(SamplingParams(**given))


def test_prompt_is_read_without_its_last_token():
    assert split_prompt([4, 5, 6]) == [4, 5]
    with pytest.raises(ValueError, match="at least 2"):
        split_prompt([4])
