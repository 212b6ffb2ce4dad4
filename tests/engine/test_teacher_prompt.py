"""Student and teacher on prompts of their own in one engine: the law of the tokens, and log-probabilities of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager

from skd_plugin.core.trace import Source
from skd_plugin.engine.sampling_rule import SamplingRule
from tests.conftest import VOCAB
from tests.engine.test_distribution import BLOCK_TOKENS, BLOCKS, assert_samples_follow
from tests.engine.test_preemption import RULES, same_trace
from tests.engine.test_references import ids_of, texts_of
from tests.rules import make_rule

pytestmark = pytest.mark.engine
SHIFTS = [0, 1, 7, BLOCK_TOKENS + 5]
SAMPLES = 500  # of each shift
LOGP = 1e-4


def letters(number: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def pair(student_len: int, shift: int, seed: int) -> tuple[list[int], list[int]]:
    """Prompts of the student and of the teacher that differ in every token but the first."""
    return [1, *letters(student_len - 1, seed)], [1, *letters(student_len + shift - 1, seed + 1000)]


PAIRS = {shift: pair(4, shift, shift) for shift in SHIFTS}
MANY = [pair(2 + 7 * i % 13, SHIFTS[i % 4], i) for i in range(40)]
SHARED = [1, *letters(2 * BLOCK_TOKENS + 3, 77)]  # what many prompts of the teacher begin with
SEEDS = list(range(40))


@pytest.fixture(scope="module", params=BLOCKS)
def of_a_shift(request: pytest.FixtureRequest, engine) -> dict[int, list]:
    """Responses one token longer than a block, all shifts in one batch."""
    shifts = SHIFTS * SAMPLES
    prompts, teachers = zip(*(PAIRS[shift] for shift in shifts), strict=True)
    length = max(2, request.param + 1)
    samples = engine(request.param).generate(prompts, make_rule(top_k=4), length, seed=3, teacher_prompts=teachers)
    return {shift: samples[i :: len(SHIFTS)] for i, shift in enumerate(SHIFTS)}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("position", [1, 2, -1])
def test_next_token_has_the_distribution_of_the_gate(of_a_shift, reference_logits, shift, position):
    samples = of_a_shift[shift]
    place = max(len(s.trace) for s in samples) if position == -1 else position
    assert_samples_follow(samples, make_rule(top_k=4), place, reference_logits)


def assert_logp(samples: list, reference_logits) -> None:
    """Those of plain forwards of each model behind its own prompt."""
    for name in ("teacher", "student"):
        prompts = [getattr(s, {"teacher": "teacher_ids", "student": "prompt_ids"}[name]) for s in samples]
        responses = [s.trace.response_ids.tolist() for s in samples]
        rows = reference_logits(name, [p + r for p, r in zip(prompts, responses, strict=True)])
        for sample, prompt, row in zip(samples, prompts, rows, strict=True):
            ids = sample.trace.response_ids.long()[:, None]
            expected = row[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids).squeeze(1)
            found = getattr(sample.trace, f"{name}_logp").double()
            torch.testing.assert_close(found, expected, atol=LOGP, rtol=0)


@pytest.fixture(scope="module")
def sampled(engine) -> Callable[..., list]:
    prompts, teachers = zip(*MANY, strict=True)
    texts = texts_of(40, 23)

    def generate(rule: SamplingRule, draft_len: int = 4, **limits: Any) -> list:
        others = dict(seed=3, seeds=SEEDS, texts=texts, teacher_prompts=teachers)
        return engine(draft_len, **limits).generate(prompts, rule, 30, **others)

    return generate


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_log_probabilities_are_those_of_each_model_on_its_prompt(sampled, reference_logits, rule) -> None:
    samples = sampled(rule)
    assert_logp(samples, reference_logits)
    assert not any(s.trace.is_from(Source.UNDRAFTED).any() for s in samples)


def test_references_come_out_as_they_went_in(sampled, reference_logits) -> None:
    samples = sampled(make_rule(top_k=VOCAB, reference_share=1.0))
    assert [s.trace.response_ids.tolist() for s in samples] == [ids_of(text)[:30] for text in texts_of(40, 23)]
    assert_logp(samples, reference_logits)


@pytest.mark.parametrize(
    ("draft_len", "limits"),
    [
        pytest.param(4, {"num_gpu_blocks_override": 9, "max_num_seqs": 16}, id="cache"),
        pytest.param(4, {"max_num_batched_tokens": 32, "max_num_seqs": 16}, id="budget"),
        pytest.param(1, {"num_gpu_blocks_override": 9, "max_num_batched_tokens": 14, "max_num_seqs": 6}, id="both"),
    ],
)
def test_responses_are_those_of_a_roomy_engine(sampled, draft_len: int, limits: dict[str, int]) -> None:
    """Prompts in pieces, requests that are preempted and go on."""
    for tight, roomy in zip(sampled(RULES["skd"], draft_len, **limits), sampled(RULES["skd"]), strict=True):
        same_trace(tight.trace, roomy.trace)


def test_the_students_own_text_does_not_depend_on_the_teachers_prompt(sampled, engine) -> None:
    prompts = [student for student, _ in MANY]
    plain = engine(4).generate(prompts, make_rule(top_k=VOCAB), 30, seeds=SEEDS)
    for one, other in zip(sampled(make_rule(top_k=VOCAB)), plain, strict=True):
        assert one.trace.response_ids.tolist() == other.trace.response_ids.tolist()


@pytest.mark.parametrize(
    "limits", [{"max_num_batched_tokens": 90}, {"long_prefill_token_threshold": 20}], ids=["budget", "short pieces"]
)
def test_requests_share_the_blocks_that_are_the_same_for_both_models(
    engine, reference_logits, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """A long beginning of the teacher's, several samples of a prompt, and beside them students that read what those
    teachers do. The pieces end inside of blocks that others read at the same time.
    """
    found: list[int] = []
    search = KVCacheManager.get_computed_blocks

    def searched(self: Any, request: Any) -> Any:
        result = search(self, request)
        found.append(result[1])
        return result

    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", searched)
    short = [[1, *letters(2 + 9 * i % 20, i)] for i in range(5)]
    long = [[1, *letters(38, i)] for i in range(5)]  # a block of the prompt alone, and more
    cases = [(s, [*SHARED, *s[1:]]) for s in short for _ in range(6)]
    cases += [(s, [*SHARED[:52], *s]) for s in long for _ in range(6)]
    cases += [(teacher, teacher) for _, teacher in cases[::6]] + [(SHARED[:40], [*SHARED, *short[0][1:]])] * 3
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(1)).tolist()
    prompts, teachers = zip(*(cases[i] for i in order), strict=True)
    pressed = engine(4, max_num_seqs=16, **limits)
    for step in range(2):
        samples = pressed.generate(prompts, make_rule(top_k=4), 5, seed=step, teacher_prompts=teachers)
        assert_logp(samples, reference_logits)
    assert sum(number >= 2 * BLOCK_TOKENS for number in found) > len(cases), "most of them find two blocks"
