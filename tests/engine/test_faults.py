"""Faults inside the engine: an error that says which model it was and what to do."""

from __future__ import annotations

import pytest
import torch

from tests.rules import make_rule

pytestmark = pytest.mark.engine
PROMPTS = [[1, 5, 6], [1, 7, 8, 9]]


def test_a_student_that_diverged_is_named(engine, hf_models):
    """On an engine of its own: NaN stays in the cache of the draft model."""
    skd = engine(3, max_num_seqs=8)
    broken = [(n, torch.full_like(weight, float("nan"))) for n, weight in hf_models["student"].state_dict().items()]
    rule = make_rule(top_k=4)
    assert len(skd.generate(PROMPTS, rule, 8, seed=1)) == len(PROMPTS)
    skd.load_student(broken)
    with pytest.raises(FloatingPointError, match=r"the student's logits are NaN or infinite.*lower learning rate"):
        skd.generate(PROMPTS, rule, 8, seed=1)
