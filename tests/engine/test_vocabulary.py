"""Two models of one vocabulary with different numbers of output rows: as if the padding were not there."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from skd_plugin.core.trace import Trace
from tests.conftest import PADDED_VOCAB, VOCAB
from tests.engine.test_distribution import PROMPTS, SAMPLES, assert_samples_follow
from tests.rules import make_rule

pytestmark = pytest.mark.engine

ROLES = ["teacher", "student"]
RULES = [
    make_rule(top_k=3),
    make_rule(top_k=0, teacher_top_p=0.9),
    make_rule(top_k=VOCAB, student_temperature=2.0),
    make_rule(top_k=4, gate="ask_again"),
    make_rule(top_k=0, gate="interpolated", threshold=0.5),
]


@pytest.mark.parametrize("role", ROLES)
def test_traces_are_those_of_the_pair_without_padding(engine, padded_pairs, role):
    prompts, seeds = PROMPTS * 10, list(range(30))
    rules = [RULES[i % len(RULES)] for i in seeds]
    plain, padded = (
        Trace.join([s.trace for s in e.generate(prompts, rules, 12, seeds=seeds)])
        for e in (engine(4), engine(4, padded_pairs[role]))
    )
    for field in fields(Trace):
        torch.testing.assert_close(
            getattr(padded, field.name), getattr(plain, field.name), atol=1e-4, rtol=0, msg=field.name
        )


@pytest.mark.parametrize("role", ROLES)
def test_distribution(engine, padded_pairs, reference_logits, role):
    """By the forwards of the models without padding."""
    rule = make_rule(top_k=3, student_temperature=1.3, teacher_top_p=0.9)
    samples = engine(4, padded_pairs[role]).generate(PROMPTS * (SAMPLES // 3), rule, 2, seed=8)
    for position in (1, 2):
        assert_samples_follow(samples, rule, position, reference_logits)


@pytest.mark.parametrize("role", ROLES)
def test_engine_says_both_sizes(engine, padded_pairs, role):
    other = {"teacher": "student", "student": "teacher"}[role]
    described = engine(4, padded_pairs[role]).description
    assert described["vocab_size"] == described[f"{other}_vocab_size"] == VOCAB
    assert described[f"{role}_vocab_size"] == PADDED_VOCAB


@pytest.mark.parametrize("role", ROLES)
def test_the_padding_of_these_models_would_win(padded_pairs, role):
    """Else the tests above would pass without a restriction."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(padded_pairs[role] / role, dtype=torch.float32)
    with torch.no_grad():
        mass = model(torch.tensor([PROMPTS[1]])).logits[0].softmax(-1)[:, VOCAB:].sum(-1)
    assert mass.max() > 0.5
