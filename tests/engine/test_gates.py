"""The law of every gate in the real engine, all gates in one batch."""

from __future__ import annotations

import math

import pytest
import torch

from skd_plugin.rollout.rule import SamplingRule
from tests.conftest import VOCAB
from tests.engine.test_law import PROMPTS, SAMPLES, assert_law, generate_mixed
from tests.unit.test_sampling import slow_warp

pytestmark = pytest.mark.engine

RULES = {
    "top_k": SamplingRule(top_k=3),
    "top_p": SamplingRule(top_k=0, gate="top_p", threshold=0.7),
    "floor": SamplingRule(top_k=0, gate="floor", threshold=0.04, teacher_temperature=0.8),
    "typical": SamplingRule(top_k=0, gate="typical", threshold=0.02),
    "confident": SamplingRule(top_k=2, gate="confident", threshold=0.08, student_temperature=1.2),
    "chance": SamplingRule(top_k=0, gate="chance", threshold=0.4, teacher_top_p=0.8),
    "interpolated": SamplingRule(
        top_k=0, gate="interpolated", threshold=0.5, student_temperature=0.7, teacher_temperature=1.3
    ),
}


def accept_set(rule: SamplingRule, p1: torch.Tensor, q1: torch.Tensor) -> torch.Tensor:
    """1 for each token that the gate keeps, float64 [V]."""
    order = p1.sort(descending=True).indices
    before = torch.zeros_like(p1).scatter(0, order, p1[order].cumsum(0) - p1[order])
    entropy = -(p1 * p1.log()).sum().item()
    in_top_k = torch.zeros_like(p1).scatter(0, order[: rule.top_k], 1.0).bool()
    kept = {
        "top_k": in_top_k,
        "top_p": before < rule.threshold,
        "floor": p1 >= rule.threshold,
        "typical": p1 >= min(rule.threshold, math.sqrt(rule.threshold) * math.exp(-entropy)),
        "confident": in_top_k | (q1 >= rule.threshold),
    }[rule.gate]
    return kept.double()


def law(rule: SamplingRule, teacher_V: torch.Tensor, student_V: torch.Tensor) -> torch.Tensor:
    """Joint law of (token, provenance) [2V]: first what was kept, then what was replaced."""
    p = torch.from_numpy(slow_warp(teacher_V.numpy(), rule.teacher_temperature, rule.teacher_top_p))
    q = torch.from_numpy(slow_warp(student_V.numpy(), rule.student_temperature, rule.student_top_p))
    if rule.gate == "chance":
        return torch.cat([(1 - rule.threshold) * q, rule.threshold * p])
    if rule.gate == "interpolated":
        return torch.cat(
            [torch.minimum(q, (1 - rule.threshold) * q + rule.threshold * p), rule.threshold * (p - q).clamp_min(0)]
        )
    inside = accept_set(rule, teacher_V.double().softmax(-1), student_V.double().softmax(-1))
    return torch.cat([inside * q, (1 - (inside * q).sum()) * p])


@pytest.fixture(scope="module")
def samples(engine) -> dict[str, list]:
    return dict(zip(RULES, generate_mixed(engine(4), list(RULES.values()), 2, seed=21), strict=True))


@pytest.mark.parametrize("gate", RULES)
@pytest.mark.parametrize("position", [1, 2])
def test_next_token_has_the_law_of_its_gate(samples, reference_logits, gate, position):
    alive = [s for s in samples[gate] if len(s.trace) >= position]
    assert len(alive) > SAMPLES / 2
    prefixes = [(*s.prompt_ids, *s.trace.response_ids[: position - 1].tolist()) for s in alive]
    distinct = [list(prefix) for prefix in dict.fromkeys(prefixes)]
    rows = {name: [x[-1] for x in reference_logits(name, distinct)] for name in ("teacher", "student")}
    table = {
        tuple(prefix): law(RULES[gate], teacher, student)
        for prefix, teacher, student in zip(distinct, rows["teacher"], rows["student"], strict=True)
    }
    outcomes = [int(s.trace.response_ids[position - 1] + VOCAB * s.trace.source[position - 1]) for s in alive]
    assert_law(outcomes, torch.stack([table[prefix] for prefix in prefixes]))


def test_every_gate_kept_some_and_replaced_some(samples):
    """Else its law would be tested at an end point only."""
    for gate, responses in samples.items():
        share = torch.cat([s.trace.source for s in responses]).float().mean().item()
        assert 0.05 < share < 0.95, f"{gate} replaced {share:.2f}"


def test_interpolation_zero_is_the_student_token_for_token(engine):
    """The same random stream drafts both, and a coin below a certainty keeps."""
    student = engine(4).generate(PROMPTS * 4, SamplingRule(top_k=VOCAB), 8, seed=5)
    other = engine(4).generate(PROMPTS * 4, SamplingRule(top_k=0, gate="interpolated", threshold=0.0), 8, seed=5)
    assert [s.trace.response_ids.tolist() for s in other] == [s.trace.response_ids.tolist() for s in student]
