"""The law of every gate in the real engine, all gates in one batch."""

from __future__ import annotations

import math

import pytest
import torch

from skd_plugin.core.accept import ACCEPTED, FLAGGED, REPLACED, RESAMPLED
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import SOURCE_LETTERS, Trace
from skd_plugin.engine.sampling_rule import SamplingRule
from tests.conftest import VOCAB
from tests.engine.test_law import PROMPTS, SAMPLES, assert_law, generate_mixed
from tests.unit.test_sampling import slow_warp

pytestmark = pytest.mark.engine

RULES = {
    "top_k": SamplingRule(top_k=3),
    "argmax": SamplingRule(top_k=3, teacher_temperature=0.0),
    "decay": SamplingRule(top_k=6, top_k_decay_len=2),  # 6, then 3
    "no write-back": SamplingRule(top_k=3, write_back=False),
    "ask_again": SamplingRule(top_k=3, gate="ask_again", student_temperature=0.8),
    "nucleus": SamplingRule(
        top_k=4, gate="top_k_of_nucleus", teacher_temperature=0.7, teacher_top_p=0.6, student_temperature=0.9
    ),
    "top_p": SamplingRule(top_k=0, gate="top_p", threshold=0.7),
    "floor": SamplingRule(top_k=0, gate="floor", threshold=0.04, teacher_temperature=0.8),
    "typical": SamplingRule(top_k=0, gate="typical", threshold=0.02),
    "confident": SamplingRule(top_k=2, gate="confident", threshold=0.08, student_temperature=1.2),
    "margin": SamplingRule(top_k=3, gate="confident_margin", threshold=0.12),
    "entropy": SamplingRule(top_k=3, gate="confident_entropy", threshold=2.4),
    "chance": SamplingRule(top_k=0, gate="chance", threshold=0.4, teacher_top_p=0.8),
    "interpolated": SamplingRule(
        top_k=0, gate="interpolated", threshold=0.5, student_temperature=0.7, teacher_temperature=1.3
    ),
}


def accept_set(rule: SamplingRule, p1: torch.Tensor, q1: torch.Tensor, p: torch.Tensor, place: int) -> torch.Tensor:
    """1 for each token that the gate keeps at this response position, float64 [V]."""
    order = p1.sort(descending=True).indices
    before = torch.zeros_like(p1).scatter(0, order, p1[order].cumsum(0) - p1[order])
    top_k = rule.top_k if not rule.top_k_decay_len else max(1, rule.top_k - rule.top_k * place // rule.top_k_decay_len)
    in_top_k = torch.zeros_like(p1).scatter(0, order[:top_k], 1.0).bool()
    first, second = q1.sort(descending=True).values[:2]
    everything = torch.ones_like(in_top_k)
    kept = {
        "top_k": in_top_k,
        "ask_again": in_top_k,
        "top_k_of_nucleus": in_top_k & (p > 0),
        "top_p": before < rule.threshold,
        "floor": p1 >= rule.threshold,
        "typical": p1 >= min(rule.threshold, math.sqrt(rule.threshold) * math.exp(-entropy(p1))),
        "confident": in_top_k | (q1 >= rule.threshold),
        "confident_margin": everything if first - second >= rule.threshold else in_top_k,
        "confident_entropy": everything if entropy(q1) <= rule.threshold else in_top_k,
    }[rule.gate]
    return kept.double()


def entropy(p: torch.Tensor) -> float:
    return -(p * p.log()).sum().item()


def law(rule: SamplingRule, teacher_V: torch.Tensor, student_V: torch.Tensor, place: int) -> torch.Tensor:
    """Joint law of (provenance, token), by the codes of core.accept, flat [6V]."""
    p = torch.from_numpy(slow_warp(teacher_V.numpy(), rule.teacher_temperature, rule.teacher_top_p))
    q = torch.from_numpy(slow_warp(student_V.numpy(), rule.student_temperature, rule.student_top_p))
    joint = torch.zeros(len(SOURCE_LETTERS), len(p), dtype=torch.float64)
    if rule.gate == "chance":
        joint[ACCEPTED], joint[REPLACED] = (1 - rule.threshold) * q, rule.threshold * p
    elif rule.gate == "interpolated":
        joint[ACCEPTED] = torch.minimum(q, (1 - rule.threshold) * q + rule.threshold * p)
        joint[REPLACED] = rule.threshold * (p - q).clamp_min(0)
    else:
        inside = accept_set(rule, teacher_V.double().softmax(-1), student_V.double().softmax(-1), p, place)
        joint[ACCEPTED] = inside * q
        rejected = 1 - joint[ACCEPTED].sum()
        if not rule.write_back:
            joint[FLAGGED] = (1 - inside) * q
        elif rule.gate == "ask_again":
            joint[RESAMPLED] = rejected * joint[ACCEPTED] / joint[ACCEPTED].sum()
        else:
            joint[REPLACED] = rejected * p
    return joint.flatten()


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
        tuple(prefix): law(RULES[gate], teacher, student, position - 1)
        for prefix, teacher, student in zip(distinct, rows["teacher"], rows["student"], strict=True)
    }
    outcomes = [int(s.trace.response_ids[position - 1] + VOCAB * s.trace.source[position - 1]) for s in alive]
    assert_law(outcomes, torch.stack([table[prefix] for prefix in prefixes]))


def test_every_gate_kept_some_and_replaced_some(samples):
    """Else its law would be tested at an end point only."""
    for gate, responses in samples.items():
        share = (torch.cat([s.trace.source for s in responses]) != ACCEPTED).float().mean().item()
        assert 0.05 < share < 0.95, f"{gate} rejected {share:.2f}"


@pytest.mark.parametrize(("gate", "measure"), [("margin", "margin"), ("entropy", "entropy")])
def test_student_was_sure_of_some_prefixes_only(samples, reference_logits, gate, measure):
    prefixes = [list(x) for x in {(*s.prompt_ids, *s.trace.response_ids[:1].tolist()) for s in samples[gate]}]
    q1 = [x[-1].softmax(-1) for x in reference_logits("student", prefixes)]
    if measure == "margin":
        sure = [(q.topk(2).values.diff().abs() >= RULES[gate].threshold).item() for q in q1]
    else:
        sure = [entropy(q) <= RULES[gate].threshold for q in q1]
    assert 0.1 < sum(sure) / len(sure) < 0.9, sum(sure) / len(sure)


def test_without_write_back_the_flagged_token_is_its_own_proposal(samples):
    record = Trace.join([s.trace for s in samples["no write-back"]])
    flagged = record.source == FLAGGED
    assert torch.equal(record.rejected_ids[flagged], record.response_ids[flagged])
    assert (record.draft_rank[flagged] >= 3).all() and (record.draft_rank[~flagged] < 3).all()


STUDENT = SamplingRule(top_k=VOCAB)
TEACHER = SamplingRule(top_k=0)
SAME = {  # rule -> the rule with which it must agree token for token, because both draw from the same random streams
    "interpolated, 0": (SamplingRule(top_k=0, gate="interpolated", threshold=0.0), STUDENT),
    "chance, 0": (SamplingRule(top_k=0, gate="chance", threshold=0.0), STUDENT),
    "floor, 0": (SamplingRule(top_k=0, gate="floor", threshold=0.0), STUDENT),
    "typical, 0": (SamplingRule(top_k=0, gate="typical", threshold=0.0), STUDENT),
    "top_p, above 1": (SamplingRule(top_k=0, gate="top_p", threshold=1.1), STUDENT),
    "ask_again, V": (SamplingRule(top_k=VOCAB, gate="ask_again"), STUDENT),
    "confident, 0": (SamplingRule(top_k=1, gate="confident", threshold=0.0), STUDENT),
    "margin, 0": (SamplingRule(top_k=1, gate="confident_margin", threshold=0.0), STUDENT),
    "entropy, ln V": (SamplingRule(top_k=1, gate="confident_entropy", threshold=math.log(VOCAB)), STUDENT),
    "no write-back": (SamplingRule(top_k=2, write_back=False), STUDENT),
    "chance, 1": (SamplingRule(top_k=0, gate="chance", threshold=1.0), TEACHER),
    "floor, above 1": (SamplingRule(top_k=0, gate="floor", threshold=1.1), TEACHER),
    "top_p, 0": (SamplingRule(top_k=0, gate="top_p", threshold=0.0), TEACHER),
    "confident, above 1": (SamplingRule(top_k=3, gate="confident", threshold=1.1), SamplingRule(top_k=3)),
    "margin, above 1": (SamplingRule(top_k=3, gate="confident_margin", threshold=1.1), SamplingRule(top_k=3)),
    "entropy, 0": (SamplingRule(top_k=3, gate="confident_entropy", threshold=0.0), SamplingRule(top_k=3)),
    "nucleus, 1": (SamplingRule(top_k=3, gate="top_k_of_nucleus"), SamplingRule(top_k=3)),
}


@pytest.fixture(scope="module")
def end_points(engine) -> dict[SamplingRule, list[list[int]]]:
    """Responses of the same prompts and seeds under every rule of `SAME`, in one batch."""
    rules = list(dict.fromkeys(rule for pair in SAME.values() for rule in pair))
    prompts, count = PROMPTS * 4, len(PROMPTS) * 4
    batch = engine(4).generate(
        prompts * len(rules), [r for r in rules for _ in range(count)], 8, seeds=[*range(count)] * len(rules)
    )
    ids = [s.trace.response_ids.tolist() for s in batch]
    return {rule: ids[i * count : (i + 1) * count] for i, rule in enumerate(rules)}


@pytest.mark.parametrize("name", SAME)
def test_end_points_agree_token_for_token(end_points, name):
    rule, same = SAME[name]
    assert end_points[rule] == end_points[same]


def test_end_points_differ_from_each_other(end_points):
    """Else the comparison above would say nothing."""
    assert end_points[STUDENT] != end_points[TEACHER] != end_points[SamplingRule(top_k=3)] != end_points[STUDENT]


def test_every_gate_alone_is_every_gate_in_the_crowd(engine, samples):
    """A response does not depend on what else is in its batch."""
    count = len(RULES)
    for index, (name, rule) in enumerate(RULES.items()):
        picks = [0, 401, 802]
        seeds = [derive_seed(21, pick * count + index) for pick in picks]
        alone = engine(4).generate([samples[name][pick].prompt_ids for pick in picks], rule, 2, seeds=seeds)
        for pick, sample in zip(picks, alone, strict=True):
            together = samples[name][pick].trace
            assert sample.trace.response_ids.tolist() == together.response_ids.tolist(), name
            assert sample.trace.source.tolist() == together.source.tolist(), name


def test_interpolation_one_is_the_teachers_law(engine, reference_logits):
    """g = 1: speculative sampling. It is p in law, though not by the teacher's own random numbers."""
    rule = SamplingRule(top_k=0, gate="interpolated", threshold=1.0)
    samples = engine(4).generate([PROMPTS[0]] * SAMPLES, rule, 1, seed=3)
    p = reference_logits("teacher", PROMPTS[:1])[0][-1].softmax(-1)
    assert_law([int(s.trace.response_ids[0]) for s in samples], p.expand(len(samples), -1))
