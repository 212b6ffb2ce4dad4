"""The distribution of every gate in the real engine, all gates in one batch."""

from __future__ import annotations

import math

import pytest
import torch

from skd_plugin.core.rng import derive_seed
from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.core.trace import Source, Trace
from skd_plugin.engine.sampling_rule import SamplingRule
from tests.conftest import VOCAB
from tests.engine.test_distribution import PROMPTS, SAMPLES, assert_distribution, generate_mixed
from tests.rules import make_rule
from tests.unit.test_gates import slow_blend
from tests.unit.test_sampling import slow_warp

pytestmark = pytest.mark.engine

RULES = {
    "top_k": make_rule(top_k=3),
    "argmax": make_rule(top_k=3, teacher_temperature=0.0),
    "decay": make_rule(top_k=6, top_k_decay_len=2),  # 6, then 3
    "no write-back": make_rule(top_k=3, write_back=False),
    "ask_again": make_rule(top_k=6, gate="ask_again", student_temperature=0.8),
    "nucleus": make_rule(
        top_k=4, gate="top_k_of_nucleus", teacher_temperature=0.7, teacher_top_p=0.6, student_temperature=0.9
    ),
    "top_p": make_rule(top_k=0, gate="top_p", threshold=0.7),
    "floor": make_rule(top_k=0, gate="floor", threshold=0.04, teacher_temperature=0.8),
    "typical": make_rule(top_k=0, gate="typical", threshold=0.02),
    "confident": make_rule(top_k=2, gate="confident", threshold=0.08, student_temperature=1.2),
    "margin": make_rule(top_k=3, gate="confident_margin", threshold=0.12),
    "entropy": make_rule(top_k=3, gate="confident_entropy", threshold=2.4),
    "foreseen": make_rule(top_k=8, gate="foreseen"),
    "blended": make_rule(top_k=0, gate="blended", threshold=0.2, student_temperature=0.8, teacher_temperature=1.2),
    "chance": make_rule(top_k=0, gate="chance", threshold=0.4, teacher_top_p=0.8),
    "interpolated": make_rule(
        top_k=0, gate="interpolated", threshold=0.5, student_temperature=0.7, teacher_temperature=1.3
    ),
}


def accept_set(
    settings: SamplingSettings, p1: torch.Tensor, q1: torch.Tensor, p: torch.Tensor, place: int
) -> torch.Tensor:
    """1 for each token that the gate keeps at this response position, float64 [V]."""
    order = p1.sort(descending=True).indices
    before = torch.zeros_like(p1).scatter(0, order, p1[order].cumsum(0) - p1[order])
    fallen = settings.top_k * place // settings.top_k_decay_len if settings.top_k_decay_len else 0
    top_k = max(1, settings.top_k - fallen) if fallen else settings.top_k
    in_top_k = torch.zeros_like(p1).scatter(0, order[:top_k], 1.0).bool()
    first, second = q1.sort(descending=True).values[:2]
    everything = torch.ones_like(in_top_k)
    kept = {
        "top_k": in_top_k,
        "ask_again": in_top_k,
        "top_k_of_nucleus": in_top_k & (p > 0),
        "foreseen": everything if q1[order[0]] >= q1.sort(descending=True).values[top_k - 1] else p1 == p1.max(),
        "top_p": before < settings.threshold,
        "floor": p1 >= settings.threshold,
        "typical": p1 >= min(settings.threshold, math.sqrt(settings.threshold) * math.exp(-entropy(p1))),
        "confident": in_top_k | (q1 >= settings.threshold),
        "confident_margin": everything if first - second >= settings.threshold else in_top_k,
        "confident_entropy": everything if entropy(q1) <= settings.threshold else in_top_k,
    }[settings.gate]
    return kept.double()


def entropy(p: torch.Tensor) -> float:
    return -(p * p.log()).sum().item()


def expected(settings: SamplingSettings, teacher_V: torch.Tensor, student_V: torch.Tensor, place: int) -> torch.Tensor:
    """Joint distribution of (provenance, token), by the codes of `Source`, flat [6V]."""
    p = torch.from_numpy(slow_warp(teacher_V.numpy(), settings.teacher_temperature, settings.teacher_top_p))
    q = torch.from_numpy(slow_warp(student_V.numpy(), settings.student_temperature, settings.student_top_p))
    joint = torch.zeros(len(Source), len(p), dtype=torch.float64)
    if settings.gate == "chance":
        joint[Source.ACCEPTED], joint[Source.REPLACED] = (1 - settings.threshold) * q, settings.threshold * p
    elif settings.gate == "interpolated":
        joint[Source.ACCEPTED] = torch.minimum(q, (1 - settings.threshold) * q + settings.threshold * p)
        joint[Source.REPLACED] = settings.threshold * (p - q).clamp_min(0)
    elif settings.gate == "blended":
        m = torch.tensor(slow_blend(p.tolist(), q.tolist(), settings.threshold), dtype=torch.float64)
        joint[Source.ACCEPTED], joint[Source.REPLACED] = torch.minimum(q, m), (m - q).clamp_min(0)
    else:
        inside = accept_set(settings, teacher_V.double().softmax(-1), student_V.double().softmax(-1), p, place)
        joint[Source.ACCEPTED] = inside * q
        rejected = 1 - joint[Source.ACCEPTED].sum()
        if not settings.write_back:
            joint[Source.FLAGGED] = (1 - inside) * q
        elif settings.gate == "ask_again":
            joint[Source.RESAMPLED] = rejected * joint[Source.ACCEPTED] / joint[Source.ACCEPTED].sum()
        else:
            joint[Source.REPLACED] = rejected * p
    return joint.flatten()


@pytest.fixture(scope="module")
def samples(engine) -> dict[str, list]:
    return dict(zip(RULES, generate_mixed(engine(4), list(RULES.values()), 2, seed=21), strict=True))


@pytest.mark.parametrize("gate", RULES)
@pytest.mark.parametrize("position", [1, 2])
def test_next_token_has_the_distribution_of_its_gate(samples, reference_logits, gate, position):
    alive = [s for s in samples[gate] if len(s.trace) >= position]
    assert len(alive) > SAMPLES / 2
    prefixes = [(*s.prompt_ids, *s.trace.response_ids[: position - 1].tolist()) for s in alive]
    distinct = [list(prefix) for prefix in dict.fromkeys(prefixes)]
    rows = {name: [x[-1] for x in reference_logits(name, distinct)] for name in ("teacher", "student")}
    table = {
        tuple(prefix): expected(RULES[gate].settings, teacher, student, position - 1)
        for prefix, teacher, student in zip(distinct, rows["teacher"], rows["student"], strict=True)
    }
    outcomes = [int(s.trace.response_ids[position - 1] + VOCAB * s.trace.source[position - 1]) for s in alive]
    assert_distribution(outcomes, torch.stack([table[prefix] for prefix in prefixes]))


def test_every_gate_kept_some_and_replaced_some(samples):
    """Else its distribution would be tested at an end point only."""
    for gate, responses in samples.items():
        share = (torch.cat([s.trace.source for s in responses]) != Source.ACCEPTED).float().mean().item()
        assert 0.05 < share < 0.95, f"{gate} rejected {share:.2f}"


@pytest.mark.parametrize(("gate", "measure"), [("margin", "margin"), ("entropy", "entropy")])
def test_student_was_sure_of_some_prefixes_only(samples, reference_logits, gate, measure):
    prefixes = [list(x) for x in {(*s.prompt_ids, *s.trace.response_ids[:1].tolist()) for s in samples[gate]}]
    q1 = [x[-1].softmax(-1) for x in reference_logits("student", prefixes)]
    if measure == "margin":
        sure = [(q.topk(2).values.diff().abs() >= RULES[gate].settings.threshold).item() for q in q1]
    else:
        sure = [entropy(q) <= RULES[gate].settings.threshold for q in q1]
    assert 0.1 < sum(sure) / len(sure) < 0.9, sum(sure) / len(sure)


def test_without_write_back_the_flagged_token_is_its_own_proposal(samples):
    record = Trace.join([s.trace for s in samples["no write-back"]])
    flagged = record.source == Source.FLAGGED
    assert torch.equal(record.rejected_ids[flagged], record.response_ids[flagged])
    assert (record.draft_rank[flagged] >= 3).all() and (record.draft_rank[~flagged] < 3).all()


STUDENT = make_rule(top_k=VOCAB)
TEACHER = make_rule(top_k=0)
SAME = {  # rule -> the rule with which it must agree token for token, because both draw from the same random streams
    "interpolated, 0": (make_rule(top_k=0, gate="interpolated", threshold=0.0), STUDENT),
    "blended, 0": (make_rule(top_k=0, gate="blended", threshold=0.0), STUDENT),
    "chance, 0": (make_rule(top_k=0, gate="chance", threshold=0.0), STUDENT),
    "floor, 0": (make_rule(top_k=0, gate="floor", threshold=0.0), STUDENT),
    "typical, 0": (make_rule(top_k=0, gate="typical", threshold=0.0), STUDENT),
    "top_p, above 1": (make_rule(top_k=0, gate="top_p", threshold=1.1), STUDENT),
    "foreseen, V": (make_rule(top_k=VOCAB, gate="foreseen"), STUDENT),
    "foreseen, 0": (make_rule(top_k=0, gate="foreseen"), make_rule(top_k=1)),
    "hand over, 1": (make_rule(top_k=3, hand_over_len=1), make_rule(top_k=3)),
    "ask_again, V": (make_rule(top_k=VOCAB, gate="ask_again"), STUDENT),
    "confident, 0": (make_rule(top_k=1, gate="confident", threshold=0.0), STUDENT),
    "margin, 0": (make_rule(top_k=1, gate="confident_margin", threshold=0.0), STUDENT),
    "entropy, ln V": (make_rule(top_k=1, gate="confident_entropy", threshold=math.log(VOCAB)), STUDENT),
    "no write-back": (make_rule(top_k=2, write_back=False), STUDENT),
    "chance, 1": (make_rule(top_k=0, gate="chance", threshold=1.0), TEACHER),
    "floor, above 1": (make_rule(top_k=0, gate="floor", threshold=1.1), TEACHER),
    "top_p, 0": (make_rule(top_k=0, gate="top_p", threshold=0.0), TEACHER),
    "confident, above 1": (make_rule(top_k=3, gate="confident", threshold=1.1), make_rule(top_k=3)),
    "margin, above 1": (make_rule(top_k=3, gate="confident_margin", threshold=1.1), make_rule(top_k=3)),
    "entropy, 0": (make_rule(top_k=3, gate="confident_entropy", threshold=0.0), make_rule(top_k=3)),
    "nucleus, 1": (make_rule(top_k=3, gate="top_k_of_nucleus"), make_rule(top_k=3)),
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
    assert end_points[STUDENT] != end_points[TEACHER] != end_points[make_rule(top_k=3)] != end_points[STUDENT]


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


def test_interpolation_one_is_the_teachers_distribution(engine, reference_logits):
    """g = 1: speculative sampling. Its distribution is p, though not by the teacher's own random numbers."""
    rule = make_rule(top_k=0, gate="interpolated", threshold=1.0)
    samples = engine(4).generate([PROMPTS[0]] * SAMPLES, rule, 1, seed=3)
    p = reference_logits("teacher", PROMPTS[:1])[0][-1].softmax(-1)
    assert_distribution([int(s.trace.response_ids[0]) for s in samples], p.expand(len(samples), -1))
