"""A response ends at the first token with which its text has a stop string, whatever the prompt ends in."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import VOCAB
from tests.rules import make_rule

pytestmark = pytest.mark.engine
PROMPTS = [[1, 5 + i % 20, *range(3, 4 + i % 9)] for i in range(24)]
RULE = make_rule(top_k=6)


def shortest(text_of, ids: list[int], stops: list[str]) -> list[int]:
    """The slow way: every prefix, from the shortest."""
    prefixes = (ids[:length] for length in range(1, len(ids) + 1))
    return next((prefix for prefix in prefixes if any(stop in text_of(prefix) for stop in stops)), ids)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    stops=st.lists(st.text("abcdefgh =", min_size=1, max_size=2), min_size=1, max_size=4, unique=True),
    include=st.booleans(),
    draft_len=st.sampled_from([1, 4]),
)
def test_responses_with_stop_strings(engine, stops: list[str], include: bool, draft_len: int) -> None:
    from vllm import SamplingParams

    skd = engine(draft_len)
    whole = skd.generate(PROMPTS, RULE, 24, seed=5)
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    stopped = skd.generate(PROMPTS, RULE, 24, seed=5, sampling_params=params)
    for one, other in zip(stopped, whole, strict=True):
        ids = other.trace.response_ids.tolist()
        expected = shortest(skd.decode, ids, stops)
        assert one.trace.response_ids.tolist() == expected
        text = skd.decode(expected)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert one.text == (text[: min(ends)[0 if include else 1]] if ends else text)
        assert one.finish == ("stop" if ends else other.finish)


@pytest.mark.parametrize("draft_len", [1, 4])
def test_the_end_of_the_prompt_has_no_part_in_it(engine, draft_len: int) -> None:
    """Neither a stop string that the prompt ends in, nor one that begins in the prompt."""
    from vllm import SamplingParams

    skd = engine(draft_len)
    seeds = range(len(PROMPTS))
    whole = skd.generate(PROMPTS, make_rule(top_k=VOCAB), 24, seeds=seeds)
    for seed, prompt, sample in zip(seeds, PROMPTS, whole, strict=True):
        last, first = skd.decode(prompt[-1:]), skd.decode(sample.trace.response_ids[:1].tolist())
        stops = [last + first, *([last] if last not in sample.text else [])]
        if stops[0] in sample.text or not first:
            continue
        params = SamplingParams(stop=stops)
        (again,) = skd.generate([prompt], make_rule(top_k=VOCAB), 24, seeds=[seed], sampling_params=params)
        assert again.trace.response_ids.tolist() == sample.trace.response_ids.tolist()
