"""Faults inside the engine: an error with a reason, and an engine that still works behind it."""

from __future__ import annotations

import pytest
import torch

from skd_plugin.rollout.requests import RequestTable
from skd_plugin.rollout.rule import SamplingRule

pytestmark = pytest.mark.engine
PROMPTS = [[1, 5, 6], [1, 7, 8, 9]]


def test_a_student_that_diverged_is_named(engine, hf_models):
    skd = engine(3)
    good = [(name, weight.clone()) for name, weight in hf_models["student"].state_dict().items()]
    rule = SamplingRule(top_k=4)
    before = skd.generate(PROMPTS, rule, 8, seed=1)
    broken = [(name, torch.full_like(weight, float("nan"))) for name, weight in good]
    skd.load_student(broken)
    with pytest.raises(FloatingPointError, match=r"the student's logits are NaN or infinite.*lower learning rate"):
        skd.generate(PROMPTS, rule, 8, seed=1)
    skd.load_student(good)
    after = skd.generate(PROMPTS, rule, 8, seed=1)
    assert [s.trace.response_ids.tolist() for s in after] == [s.trace.response_ids.tolist() for s in before]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_number_is_enough(bad: float):
    table = RequestTable({}, torch.device("cpu"), 2, 1.0, 5)
    logits = torch.randn(3, 5)
    assert table.finite(logits, "teacher") is logits
    masked = logits.clone()
    masked[1, 2] = -float("inf")  # a token that cannot be drawn is no fault
    assert table.finite(masked, "teacher") is masked
    assert table.take([]) == []
    logits[1, 2] = bad
    assert table.finite(logits, "teacher").isfinite().all()
    with pytest.raises(FloatingPointError, match="the teacher's logits"):
        table.take([])
    assert table.take([]) == []  # told once
