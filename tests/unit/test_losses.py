"""The losses against an independent float64 reference that adds probabilities, not logarithms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.core import losses
from skd_plugin.core.losses import LOSSES

every_loss = pytest.mark.parametrize("kind", LOSSES)


def slow_buckets(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """K + 1 probabilities of one token; the rest is added up entry by entry."""
    outside = [v for v in range(len(probs)) if v not in set(ids.tolist())]
    return torch.stack([*(probs[v] for v in ids.tolist()), sum((probs[v] for v in outside), probs.new_zeros(()))])


def slow_kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return sum((a * (a / b).log() for a, b in zip(left, right, strict=True) if a > 0), left.new_zeros(()))


def slow_loss(kind: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor, ids: torch.Tensor):
    """float64 [N]."""
    values = []
    for student, teacher, own_ids in zip(student_logits.double(), teacher_logits.double(), ids, strict=True):
        q, p = slow_buckets(student.softmax(-1), own_ids), slow_buckets(teacher.softmax(-1), own_ids)
        values.append(
            {"forward_kl": lambda p=p, q=q: slow_kl(p, q), "reverse_kl": lambda p=p, q=q: slow_kl(q, p)}[kind]()
        )
    return torch.stack(values)


def make_case(tokens: int, vocab: int, top_k: int, seed: int = 0, scale: float = 2.0):
    """Student's logits, teacher's logits, and the teacher's top-K as a rollout records them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, vocab, generator=generator) * scale for _ in range(2))
    logp, ids = teacher.log_softmax(-1).topk(top_k, dim=-1)
    return student, teacher, ids, logp


@every_loss
@pytest.mark.parametrize("top_k", [1, 4, 19, 20])
def test_value_matches_the_reference(kind, top_k):
    student, teacher, ids, logp = make_case(6, 20, top_k)
    value = LOSSES[kind](student, ids, logp)
    assert value.shape == (6,) and value.dtype == torch.float32
    torch.testing.assert_close(value.double(), slow_loss(kind, student, teacher, ids), atol=3e-6, rtol=3e-5)


@every_loss
@pytest.mark.parametrize("top_k", [1, 4, 9, 10])
def test_gradient_matches_finite_differences_of_the_reference(kind, top_k):
    student, teacher, ids, logp = make_case(3, 10, top_k, scale=1.0)
    student.requires_grad_()
    LOSSES[kind](student, ids, logp).sum().backward()
    step, numeric = 1e-5, torch.zeros(3, 10, dtype=torch.float64)
    for v in range(10):
        shift = torch.zeros(10, dtype=torch.float64)
        shift[v] = step
        up, down = (slow_loss(kind, student.detach().double() + s, teacher, ids) for s in (shift, -shift))
        numeric[:, v] = (up - down) / (2 * step)
    torch.testing.assert_close(student.grad.double(), numeric, atol=2e-6, rtol=1e-4)


@every_loss
@pytest.mark.parametrize("top_k", [1, 5, 15, 16])
def test_equal_distributions_cost_nothing(kind, top_k):
    _, teacher, ids, logp = make_case(8, 16, top_k)
    student = (teacher + 3.0).requires_grad_()  # a shift of all logits is the same distribution
    value = LOSSES[kind](student, ids, logp)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(8), atol=2e-6, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros(8, 16), atol=2e-6, rtol=0)


@every_loss
def test_whole_vocabulary_is_the_plain_divergence(kind):
    """K = V in any order of the teacher's entries; torch's own kl_div is the witness."""
    student, teacher, ids, logp = make_case(7, 30, 30)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    target, given = (p, q) if kind == "forward_kl" else (q, p)
    full = torch.nn.functional.kl_div(given, target, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(LOSSES[kind](student, ids, logp), full)


@every_loss
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 4),
    vocab=st.integers(2, 24),
    scale=st.sampled_from([0.0, 0.5, 3.0, 8.0]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_shape(kind, tokens, vocab, scale, seed, data):
    """Agrees with the reference, is not negative, and a smaller K never raises it."""
    top_k = data.draw(st.integers(1, vocab))
    student, teacher, ids, logp = make_case(tokens, vocab, top_k, seed, scale)
    value = LOSSES[kind](student, ids, logp)
    assert value.shape == (tokens,)
    assert (value > -1e-5).all()
    # float32 knows a small teacher tail, 1 - sum of the head, to few digits: those tokens are not compared.
    clear = teacher.double().softmax(-1).sort(descending=True).values[:, max(top_k - 1, 1) :].sum(-1) > 1e-3
    if top_k == vocab:
        expected = slow_loss(kind, student, teacher, ids) if tokens else value.double()
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-3)
    merged = LOSSES[kind](student, ids[:, : top_k - 1], logp[:, : top_k - 1]) if top_k > 1 else torch.zeros(tokens)
    assert (merged <= value + 1e-3 + 1e-3 * value)[clear].all()
    clear &= teacher.double().softmax(-1).sort(descending=True).values[:, top_k:].sum(-1) > 1e-3
    if clear.any():
        expected = slow_loss(kind, student[clear], teacher[clear], ids[clear])
        torch.testing.assert_close(value[clear].double(), expected, atol=1e-3, rtol=1e-3)


@every_loss
@pytest.mark.parametrize("top_k", [1, 3, 7, 8])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits_stay_finite(kind, top_k, scale):
    """Student sure of a token that the teacher is sure not to take, and the other way round."""
    teacher = torch.zeros(3, 8)
    teacher[:, 0] = scale
    student = torch.zeros(3, 8)
    student[0, 5], student[1, 0], student[2, 0] = scale, scale, -scale
    student.requires_grad_()
    logp, ids = teacher.log_softmax(-1).topk(top_k, dim=-1)
    value = LOSSES[kind](student, ids, logp)
    value.sum().backward()
    assert value.isfinite().all() and (value > -1e-5).all()
    assert student.grad.isfinite().all()
    if kind == "forward_kl":
        assert value[0] > 0.9 * scale, "the student's wrong certainty costs its full log-ratio"
        assert student.grad[0, 0] < -0.9, "and is pushed back with full strength"


@every_loss
def test_the_tail_has_a_gradient(kind):
    """Mass that the student moves outside the teacher's top-K costs, though nothing there is listed."""
    _, _, ids, logp = make_case(1, 16, 4)
    student = torch.zeros(1, 16, requires_grad=True)
    LOSSES[kind](student, ids, logp).sum().backward()
    outside = torch.ones(16, dtype=torch.bool)
    outside[ids[0]] = False
    assert (student.grad[0, outside] > 0).all()


def test_log_tail_of_a_full_head_is_finite():
    full = torch.tensor([[0.5, 0.5]]).log()
    torch.testing.assert_close(losses.log_tail(full), torch.tensor([-15.942385]))
    torch.testing.assert_close(losses.log_tail(torch.tensor([[0.5, 0.25]]).log()), torch.tensor([0.25]).log())


@every_loss
def test_half_precision_logits_are_computed_in_float32(kind):
    student, _, ids, logp = make_case(5, 20, 6)
    half = student.to(torch.bfloat16)
    torch.testing.assert_close(LOSSES[kind](half, ids, logp), LOSSES[kind](half.float(), ids, logp))
