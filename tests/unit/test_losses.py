"""The losses against an independent float64 reference that adds probabilities, not logarithms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.core.losses import DIVERGENCES, make_divergence, top_k_loss

BETA, ALPHA = 0.3, 0.2
every_loss = pytest.mark.parametrize("kind", DIVERGENCES)


def token_loss(kind: str, beta: float = BETA, alpha: float = ALPHA):
    return top_k_loss(make_divergence(kind, beta=beta, alpha=alpha))


def slow_buckets(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """K + 1 probabilities of one token; the rest is added up entry by entry."""
    outside = [v for v in range(len(probs)) if v not in set(ids.tolist())]
    return torch.stack([*(probs[v] for v in ids.tolist()), sum((probs[v] for v in outside), probs.new_zeros(()))])


def slow_kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return sum((a * (a / b).log() for a, b in zip(left, right, strict=True) if a > 0), left.new_zeros(()))


def slow_head_share(p: torch.Tensor, q: torch.Tensor) -> float:
    mass, head = 0.0, []
    for index in sorted(range(len(p)), key=lambda i: -p[i].item()):
        if mass < 0.5:
            head.append(index)
        mass += p[index].item()
    gap = (p - q).abs().detach()
    return (gap[head].sum() / gap.sum()).item() if gap.sum() > 0 else 0.0


def slow_divergence(kind: str, p: torch.Tensor, q: torch.Tensor, share: float | None = None) -> torch.Tensor:
    if kind == "jsd":
        middle = BETA * p + (1 - BETA) * q
        return BETA * slow_kl(p, middle) + (1 - BETA) * slow_kl(q, middle)
    if kind == "adaptive_kl":
        share = slow_head_share(p, q) if share is None else share
        return share * slow_kl(p, q) + (1 - share) * slow_kl(q, p)
    return {
        "forward_kl": lambda: slow_kl(p, q),
        "reverse_kl": lambda: slow_kl(q, p),
        "symmetric_kl": lambda: (slow_kl(p, q) + slow_kl(q, p)) / 2,
        "skew_forward_kl": lambda: slow_kl(p, ALPHA * p + (1 - ALPHA) * q),
        "skew_reverse_kl": lambda: slow_kl(q, ALPHA * q + (1 - ALPHA) * p),
        "total_variation": lambda: sum((a - b).clamp_min(0) for a, b in zip(p, q, strict=True)),
    }[kind]()


def slow_loss(kind: str, student_logits, teacher_logits, ids, shares: list[float] | None = None) -> torch.Tensor:
    """float64 [N]. `shares` holds the adaptive weight still, which the gradient treats as a constant."""
    values = []
    for n, own_ids in enumerate(ids):
        q = slow_buckets(student_logits[n].double().softmax(-1), own_ids)
        p = slow_buckets(teacher_logits[n].double().softmax(-1), own_ids)
        values.append(slow_divergence(kind, p, q, None if shares is None else shares[n]))
    return torch.stack(values)


def make_case(tokens: int, vocab: int, top_k: int, seed: int = 0, scale: float = 2.0):
    """Student's logits, teacher's logits, and what a rollout records of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, vocab, generator=generator) * scale for _ in range(2))
    return student, teacher, *record(teacher, top_k)


def record(teacher: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N, K] and log-probabilities [N, K + 1] as the engine keeps them."""
    full = teacher.log_softmax(-1)
    logp, ids = full.topk(top_k, dim=-1)
    return ids, torch.cat([logp, full.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)], 1)


@every_loss
@pytest.mark.parametrize("top_k", [1, 4, 19, 20])
def test_value_matches_the_reference(kind, top_k):
    student, teacher, ids, logp = make_case(6, 20, top_k)
    value = token_loss(kind)(student, ids, logp)
    assert value.shape == (6,) and value.dtype == torch.float32
    torch.testing.assert_close(value.double(), slow_loss(kind, student, teacher, ids), atol=3e-6, rtol=3e-5)


@every_loss
@pytest.mark.parametrize("top_k", [1, 4, 9, 10])
def test_gradient_matches_finite_differences_of_the_reference(kind, top_k):
    student, teacher, ids, logp = make_case(3, 10, top_k, scale=1.0)
    student.requires_grad_()
    token_loss(kind)(student, ids, logp).sum().backward()
    buckets = [
        [slow_buckets(x[n].detach().double().softmax(-1), ids[n]) for x in (teacher, student)] for n in range(3)
    ]
    shares = [slow_head_share(*pair) for pair in buckets]
    step, numeric = 1e-5, torch.zeros(3, 10, dtype=torch.float64)
    for v in range(10):
        shift = torch.zeros(10, dtype=torch.float64)
        shift[v] = step
        up, down = (slow_loss(kind, student.detach().double() + s, teacher, ids, shares) for s in (shift, -shift))
        numeric[:, v] = (up - down) / (2 * step)
    torch.testing.assert_close(student.grad.double(), numeric, atol=2e-6, rtol=1e-4)


@every_loss
@pytest.mark.parametrize("top_k", [1, 5, 15, 16])
def test_equal_distributions_cost_nothing(kind, top_k):
    _, teacher, ids, logp = make_case(8, 16, top_k)
    student = (teacher + 3.0).requires_grad_()  # a shift of all logits is the same distribution
    value = token_loss(kind)(student, ids, logp)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(8), atol=2e-6, rtol=0)
    if kind != "total_variation":  # it has a kink there
        torch.testing.assert_close(student.grad, torch.zeros(8, 16), atol=2e-6, rtol=0)


@every_loss
def test_different_distributions_cost_something(kind):
    student, _, ids, logp = make_case(8, 16, 4)
    assert (token_loss(kind)(student, ids, logp) > 1e-3).all()


@every_loss
def test_whole_vocabulary_is_the_plain_divergence(kind):
    """K = V in any order of the teacher's entries is the divergence of the two log-softmaxes."""
    student, teacher, ids, logp = make_case(7, 30, 30)
    divergence = make_divergence(kind, beta=BETA, alpha=ALPHA)
    expected = divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(token_loss(kind)(student, ids, logp), expected)


def test_kl_is_torchs_kl():
    student, teacher, ids, logp = make_case(7, 30, 30)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for kind, target, given_ in (("forward_kl", p, q), ("reverse_kl", q, p)):
        full = torch.nn.functional.kl_div(given_, target, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(token_loss(kind)(student, ids, logp), full)


@every_loss
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 4),
    vocab=st.integers(2, 24),
    scale=st.sampled_from([0.0, 0.5, 3.0, 8.0]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_shape(kind, tokens, vocab, scale, seed, data):
    """Agrees with the reference and is not negative, however little mass the tails have."""
    top_k = data.draw(st.integers(1, vocab))
    student, teacher, ids, logp = make_case(tokens, vocab, top_k, seed, scale)
    value = token_loss(kind)(student, ids, logp)
    assert value.shape == (tokens,)
    assert (value > -1e-5).all()
    if tokens:
        expected = slow_loss(kind, student, teacher, ids)
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-3)


@every_loss
@settings(max_examples=40, deadline=None)
@given(vocab=st.integers(2, 24), scale=st.sampled_from([0.5, 3.0, 8.0]), seed=st.integers(0, 10**6))
def test_joining_categories_never_raises_it(kind, vocab, scale, seed):
    """A smaller K is a coarser view."""
    if kind == "adaptive_kl":
        pytest.skip("its head is chosen on the categories, so joining them may raise it")
    student, teacher, *_ = make_case(3, vocab, 1, seed, scale)
    previous = torch.full((3,), -1e-5)
    for top_k in range(1, vocab + 1):
        value = token_loss(kind)(student, *record(teacher, top_k))
        assert (value >= previous - 1e-5 - 1e-5 * previous.abs()).all()
        previous = value


@pytest.mark.parametrize("beta", [1e-3, 1e-4])
def test_jsd_tends_to_the_two_kls(beta):
    student, _, ids, logp = make_case(6, 20, 5, scale=1.0)
    forward, reverse = (token_loss(kind)(student.double(), ids, logp) for kind in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(
        token_loss("jsd", beta=beta)(student, ids, logp) / beta, forward, atol=0, rtol=30 * beta + 2e-3
    )
    other = token_loss("jsd", beta=1 - beta)(student, ids, logp) / beta
    torch.testing.assert_close(other, reverse, atol=0, rtol=30 * beta + 2e-3)


def test_jsd_is_symmetric_at_one_half_and_bounded_by_ln_2():
    _, teacher, *_ = make_case(6, 20, 20, scale=50.0)
    student = make_case(6, 20, 20, seed=1, scale=50.0)[0]
    one = token_loss("jsd", beta=0.5)(student, *record(teacher, 20))
    two = token_loss("jsd", beta=0.5)(teacher, *record(student, 20))
    torch.testing.assert_close(one, two)
    assert (one <= math.log(2) + 1e-5).all() and one.max() > 0.6


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_skew_zero_is_the_kl(kind):
    student, _, ids, logp = make_case(6, 20, 5)
    skewed = token_loss(f"skew_{kind}", alpha=0.0)(student, ids, logp)
    torch.testing.assert_close(skewed, token_loss(kind)(student, ids, logp))


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
    value = token_loss(kind)(student, *record(teacher, top_k))
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
    inside = set(ids[0].tolist())
    outside = next(v for v in range(16) if v not in inside)
    student = torch.zeros(1, 16)
    student[0, outside] = 5.0
    student.requires_grad_()
    token_loss(kind)(student, ids, logp).sum().backward()
    assert student.grad[0, outside] > 0


@every_loss
def test_half_precision_logits_are_computed_in_float32(kind):
    student, _, ids, logp = make_case(4, 20, 5)
    value = token_loss(kind)(student.to(torch.bfloat16), ids, logp)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, token_loss(kind)(student.to(torch.bfloat16).float(), ids, logp))


def test_unknown_divergence():
    with pytest.raises(KeyError):
        make_divergence("hellinger", beta=0.5, alpha=0.1)
