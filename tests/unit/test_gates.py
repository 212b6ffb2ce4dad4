"""Every gate against its definition, token by token, in float64 and plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from skd_plugin.core.gates import GATES, Proposals

VOCAB = 12
SETTINGS = {"top_k": 0.0, "top_p": 0.6, "floor": 0.05, "typical": 0.09, "confident": 0.2}
TOP_K = 3


def proposals(seed: int, threshold: float, top_k: int = TOP_K, repeat: int = 1, **settings: float) -> Proposals:
    """One prefix; every token of the vocabulary is proposed, `repeat` times."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(VOCAB, generator=generator) * 1.5 for _ in range(2))
    count = VOCAB * repeat
    settings = {
        "student_temperature": 1.0,
        "student_top_p": 1.0,
        "teacher_temperature": 1.0,
        "teacher_top_p": 1.0,
    } | settings
    return Proposals(
        draft_N=torch.arange(VOCAB).repeat_interleave(repeat),
        teacher_logits_NV=teacher.expand(count, -1),
        student_logp_NV=student.log_softmax(-1).expand(count, -1),
        position_N=torch.arange(count),
        seed_N=torch.full((count,), seed),
        top_k_N=torch.full((count,), top_k),
        threshold_N=torch.full((count,), threshold),
        **{f"{name}_N": torch.full((count,), value) for name, value in settings.items()},
    )


def laws(case: Proposals) -> tuple[list[float], list[float]]:
    """p1 and q1 in float64."""
    return tuple(x[0].double().softmax(-1).tolist() for x in (case.teacher_logits_NV, case.student_logp_NV))


def accept_set(gate: str, threshold: float, p: list[float], q: list[float]) -> set[int]:
    order = sorted(range(VOCAB), key=lambda v: -p[v])
    top_k = set(order[:TOP_K])
    if gate == "top_k":
        return top_k
    if gate == "top_p":
        return {v for place, v in enumerate(order) if sum(p[u] for u in order[:place]) < threshold}
    if gate == "floor":
        return {v for v in order if p[v] >= threshold}
    if gate == "typical":
        entropy = -sum(x * math.log(x) for x in p)
        return {v for v in order if p[v] >= min(threshold, math.sqrt(threshold) * math.exp(-entropy))}
    return top_k | {v for v in order if q[v] >= threshold}


@pytest.mark.parametrize("gate", SETTINGS)
@pytest.mark.parametrize("seed", range(8))
def test_kept_tokens_are_the_set_of_the_definition(gate, seed):
    case = proposals(seed, SETTINGS[gate])
    kept = set(GATES[gate].keep(case).nonzero().squeeze(1).tolist())
    assert kept == accept_set(gate, SETTINGS[gate], *laws(case))


def test_sets_of_the_test_are_not_trivial():
    """Else the test above would not tell the gates apart."""
    for gate, threshold in SETTINGS.items():
        sizes = [len(accept_set(gate, threshold, *laws(proposals(seed, threshold)))) for seed in range(8)]
        assert min(sizes) > 0 and max(sizes) < VOCAB, gate
        assert gate == "top_k" or len(set(sizes)) > 1, gate


@pytest.mark.parametrize(
    ("gate", "threshold", "top_k", "kept"),
    [
        ("top_k", 0.0, VOCAB, True),
        ("top_k", 0.0, 0, False),
        ("top_p", 1.1, 0, True),
        ("top_p", 0.0, 0, False),
        ("floor", 0.0, 0, True),
        ("floor", 1.1, 0, False),
        ("typical", 0.0, 0, True),
        ("confident", 0.0, 0, True),
        ("confident", 1.1, 0, False),
        ("confident", 1.1, VOCAB, True),
        ("chance", 0.0, 0, True),
        ("chance", 1.0, VOCAB, False),
        ("interpolated", 0.0, 0, True),
    ],
)
def test_end_points_are_the_student_and_the_teacher(gate, threshold, top_k, kept):
    assert (GATES[gate].keep(proposals(1, threshold, top_k)) == kept).all()


def test_confident_above_one_is_top_k():
    case = proposals(2, 1.1)
    assert torch.equal(GATES["confident"].keep(case), GATES["top_k"].keep(case))


@pytest.mark.parametrize("gate", GATES)
def test_replacement_without_residual_is_the_warped_teacher(gate):
    case = proposals(3, 0.5, teacher_temperature=0.7, teacher_top_p=0.8)
    if gate != "interpolated":
        torch.testing.assert_close(GATES[gate].replacement(case), case.teacher_probs_NV)


def test_chance_keeps_at_its_rate():
    kept = GATES["chance"].keep(proposals(5, 0.3, repeat=2000)).double().mean().item()
    assert abs(kept - 0.7) < 5 * math.sqrt(0.21 / (2000 * VOCAB))


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_interpolation_has_exactly_the_mixed_law(gamma):
    """q(v) P(keep v) + P(reject) residual(v) = (1 - g) q(v) + g p(v); the coin's bound is exact, so is the sum."""
    case = proposals(6, gamma, student_temperature=0.8, teacher_temperature=0.6)
    p, q = case.teacher_probs_NV[0].double(), case.student_probs_NV[0].double()
    mixture = (1 - gamma) * q + gamma * p
    keep = (mixture / q).clamp_max(1.0)
    residual = GATES["interpolated"].replacement(case)[0].double()
    law = q * keep + (1 - (q * keep).sum()) * residual / residual.sum()
    torch.testing.assert_close(law, mixture, atol=1e-6, rtol=0)
    rejected = 1 - (q * keep).sum()
    torch.testing.assert_close(rejected, gamma * 0.5 * (p - q).abs().sum(), atol=1e-6, rtol=0)
    many = proposals(6, gamma, student_temperature=0.8, teacher_temperature=0.6, repeat=4000)
    rates = GATES["interpolated"].keep(many).double().view(VOCAB, -1).mean(1)
    torch.testing.assert_close(rates, keep, atol=0.04, rtol=0)


def test_interpolation_of_equal_laws_always_has_a_replacement():
    case = proposals(7, 0.5)
    same = Proposals(**{**vars(case), "student_logp_NV": case.teacher_logits_NV.log_softmax(-1)})
    assert (GATES["interpolated"].replacement(same).sum(-1) > 0).all()
