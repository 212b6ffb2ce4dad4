"""A small cache and a small budget of tokens change when a token is sampled, and not which one."""

from __future__ import annotations

import pytest

from skd_plugin.core.trace import Source
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.engine.scheduler import SKDScheduler
from tests.conftest import VOCAB
from tests.rules import make_rule
from tests.traces import same_trace

pytestmark = pytest.mark.engine
LETTERS = "abcdefghijklmnopqrstuvwxyz +="
NUMBER = 40
PROMPTS = [[1, 5 + i % 20, *range(3, 4 + i % 9)] for i in range(NUMBER)]
TEXTS = ["".join(LETTERS[(7 * i + j * j) % len(LETTERS)] for j in range(1 + 5 * i % 60)) for i in range(NUMBER)]
SEEDS = list(range(NUMBER))
RULES = {
    "skd": make_rule(top_k=4),
    "asked again": make_rule(top_k=3, gate="ask_again"),
    "legs of the teacher": make_rule(top_k=4, hand_over_len=5, hand_overs=3, hand_over_until=2.0),
    "on policy": make_rule(top_k=VOCAB),
    "references beside samples": make_rule(top_k=4, reference_share=0.5),
    "the student alone": make_rule(top_k=4).student_only(0.0),
}


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> dict[str, int]:
    """How often a request was preempted, resumed, and made to wait with its drafts."""
    seen = {"preempted": 0, "resumed": 0, "waited": 0}
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    preempt, update, reserve = (
        SKDScheduler._preempt_request,
        SKDScheduler._update_request_with_output,
        SKDScheduler._reserve_prefill_lookahead,
    )

    def preempted(self, request, *args, **others):
        seen["preempted"] += request.num_output_tokens > 0 and request not in self._without_last
        preempt(self, request, *args, **others)

    def updated(self, request, new_token_ids, **others):
        seen["resumed"] += request in self._without_last
        return update(self, request, new_token_ids, **others)

    def reserved(self, *args):
        number = reserve(self, *args)
        seen["waited"] += number == 0
        return number

    patch.setattr(SKDScheduler, "_preempt_request", preempted)
    patch.setattr(SKDScheduler, "_update_request_with_output", updated)
    patch.setattr(SKDScheduler, "_reserve_prefill_lookahead", reserved)
    return seen


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("draft_len", "limits"),
    [
        pytest.param(4, {"num_gpu_blocks_override": 9, "max_num_seqs": 16}, id="cache"),
        pytest.param(4, {"max_num_batched_tokens": 32, "max_num_seqs": 16}, id="budget"),
        pytest.param(1, {"num_gpu_blocks_override": 9, "max_num_batched_tokens": 14, "max_num_seqs": 6}, id="both"),
    ],
)
def test_responses_are_those_of_a_roomy_engine(
    engine, counts: dict[str, int], rule: SamplingRule, draft_len: int, limits: dict[str, int]
) -> None:
    def sampled(engine) -> list:
        return engine.generate(PROMPTS, rule, 60, seed=3, seeds=SEEDS, texts=TEXTS)

    roomy = sampled(engine(4))
    counts.update(dict.fromkeys(counts, 0))
    tight = sampled(engine(draft_len, **limits))
    assert counts["preempted"] == counts["resumed"]
    assert ("num_gpu_blocks_override" in limits) == (counts["preempted"] > 2)
    assert ("max_num_batched_tokens" in limits) == (counts["waited"] > 2)
    for one, other in zip(tight, roomy, strict=True):
        assert (one.text, one.finish) == (other.text, other.finish)
        same_trace(one.trace, other.trace)
        assert not one.trace.is_from(Source.UNDRAFTED).any()
