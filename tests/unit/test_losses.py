"""The losses against an independent float64 reference that adds probabilities, not logarithms."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.core.losses import (
    LOSSES,
    LossSettings,
    RegionSettings,
    categories,
    make_divergence,
    make_token_loss,
    top_k_loss,
    whole_vocabulary_loss,
)
from skd_plugin.core.targets import REGIONS, Targets
from skd_plugin.core.trace import NOTHING, Source

BETA, ALPHA = 0.3, 0.2
DIVERGENCES = [kind for kind, loss in LOSSES.items() if loss.divergence]
every_divergence = pytest.mark.parametrize("kind", DIVERGENCES)
every_loss = pytest.mark.parametrize("kind", LOSSES)
temperatures = pytest.mark.parametrize("tau", [1.0, 0.5, 3.0])


def token_loss(kind: str, *, vocab: int | None = None, **changes):
    return make_token_loss(LossSettings(kind, **{"beta": BETA, "alpha": ALPHA} | changes), vocab=vocab)


# --- the reference ---


def slow_categories(logits: torch.Tensor, ids: list[int], token: int, tau: float) -> torch.Tensor:
    """Probabilities of one position: the ids, the token if it is another one, and the rest, added up one by one."""
    probs = (logits.double() / tau).softmax(-1)
    ids = [v for v in ids if v != NOTHING]
    named = ids if token in ids else [*ids, token]
    rest = [probs[v] for v in range(len(probs)) if v not in named]
    return torch.stack([*(probs[v] for v in named), *([sum(rest)] if rest else [])])


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


def slow_pairs(student: torch.Tensor, teacher: torch.Tensor, targets: Targets, tau: float = 1.0) -> list:
    """(p, q) of each position."""
    ids, tokens = targets.teacher_ids_NK.tolist(), targets.token_N.tolist()
    return [
        tuple(slow_categories(x[n], ids[n], tokens[n], tau) for x in (teacher, student)) for n in range(len(tokens))
    ]


def slow_loss(kind: str, student, teacher, targets: Targets, tau: float = 1.0, shares=None) -> torch.Tensor:
    """float64 [N]. `shares` holds the adaptive weight still, which the gradient treats as a constant."""
    if kind == "cross_entropy":
        probs = student.double().softmax(-1)
        return torch.stack([-probs[n, token].log() for n, token in enumerate(targets.token_N.tolist())])
    pairs = slow_pairs(student, teacher, targets, tau)
    return torch.stack([slow_divergence(kind, *pair, shares[n] if shares else None) for n, pair in enumerate(pairs)])


# --- what a rollout records ---


def record(
    teacher: torch.Tensor,
    top_k: int,
    tau: float = 1.0,
    tokens: list[int] | None = None,
    students: torch.Tensor | None = None,
) -> Targets:
    """As the engine keeps it; by default the emitted tokens are the teacher's most probable ones.

    Args:
        students: [N, J], the student's first tokens, which are entries, too.
    """
    full = teacher.log_softmax(-1)
    logp, ids = full.topk(top_k, dim=-1)
    token = ids[:, 0] if tokens is None else torch.tensor(tokens, dtype=torch.int64)
    named = torch.cat([ids, token[:, None]], 1)
    if students is not None:
        again = (students[:, :, None] == ids[:, None]).any(-1)
        named = torch.cat([named, students], 1)
        logp = torch.cat([logp, full.gather(1, students).masked_fill(again, -math.inf)], 1)
        ids = torch.cat([ids, students.masked_fill(again, NOTHING)], 1)
    return Targets(
        teacher_ids_NK=ids,
        teacher_logp_NK=logp,
        teacher_rest_N=(full.scatter(1, named, float("-inf")) / tau).logsumexp(-1),
        token_N=token,
        token_teacher_logp_N=full.gather(1, token[:, None]).squeeze(1),
        token_student_logp_N=torch.zeros(len(token)),
        teacher_entropy_N=torch.special.entr(full.exp()).sum(-1),
        source_N=torch.zeros(len(token), dtype=torch.uint8),
    )


def make_logits(tokens: int, vocab: int, seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, vocab, generator=generator) * scale for _ in range(2))
    return student, teacher


def make_case(tokens: int, vocab: int, top_k: int, seed: int = 0, scale: float = 2.0, tau: float = 1.0):
    """Student's logits, teacher's logits, and what is recorded of it; the emitted tokens are of any rank."""
    student, teacher = make_logits(tokens, vocab, seed, scale)
    ranks = [(seed + 3 * n) % vocab for n in range(tokens)]
    order = teacher.argsort(-1, descending=True)
    return student, teacher, record(teacher, top_k, tau, [order[n, rank].item() for n, rank in enumerate(ranks)])


# --- values and gradients ---


@every_loss
@temperatures
@pytest.mark.parametrize("top_k", [1, 4, 18, 19, 20])
def test_value_matches_the_reference(kind, tau, top_k):
    student, teacher, targets = make_case(8, 20, top_k, tau=tau)
    value = token_loss(kind, temperature=tau)(student, targets)
    assert value.shape == (8,) and value.dtype == torch.float32
    torch.testing.assert_close(value.double(), slow_loss(kind, student, teacher, targets, tau), atol=3e-6, rtol=1e-4)


@every_loss
@temperatures
@pytest.mark.parametrize("top_k", [1, 4, 8, 9, 10])
def test_gradient_matches_finite_differences_of_the_reference(kind, tau, top_k):
    student, teacher, targets = make_case(4, 10, top_k, scale=1.0, tau=tau)
    student.requires_grad_()
    token_loss(kind, temperature=tau)(student, targets).sum().backward()
    shares = [slow_head_share(*pair) for pair in slow_pairs(student.detach(), teacher, targets, tau)]
    step, numeric = 1e-5, torch.zeros(4, 10, dtype=torch.float64)
    for v in range(10):
        shift = torch.zeros(10, dtype=torch.float64)
        shift[v] = step
        up, down = (
            slow_loss(kind, student.detach().double() + s, teacher, targets, tau, shares) for s in (shift, -shift)
        )
        numeric[:, v] = (up - down) / (2 * step)
    torch.testing.assert_close(student.grad.double(), numeric, atol=3e-6, rtol=3e-4)


@pytest.mark.parametrize("kind", [k for k in DIVERGENCES if k not in ("adaptive_kl", "total_variation")])
def test_double_precision_passes_gradcheck(kind):
    """Composed of everything. (The adaptive weight is a constant to the gradient; total variation has kinks.)"""
    student, _, targets = make_case(6, 8, 3, tau=2.0)
    targets = with_sources(targets, [0, 1, 2, 5, 1, 3])
    options = dict(
        temperature=2.0, replaced_kind="cross_entropy", accepted_weight=0.5, replaced_weight=2.0, clamp=9.0, vocab=8
    )
    padded = torch.cat([student, torch.ones(6, 3)], 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_loss(kind, **options)(x, targets), padded)


@every_divergence
@temperatures
@pytest.mark.parametrize("top_k", [1, 5, 15, 16])
def test_equal_distributions_cost_nothing(kind, tau, top_k):
    _, teacher, targets = make_case(8, 16, top_k, tau=tau)
    student = (teacher + 3.0).requires_grad_()  # a shift of all logits is the same distribution
    value = token_loss(kind, temperature=tau)(student, targets)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(8), atol=2e-6, rtol=0)
    if kind != "total_variation":  # it has a kink there
        torch.testing.assert_close(student.grad, torch.zeros(8, 16), atol=3e-6, rtol=0)


@every_divergence
def test_different_distributions_cost_something(kind):
    student, _, targets = make_case(8, 16, 4)
    assert (token_loss(kind)(student, targets) > 1e-3).all()


@every_divergence
@temperatures
def test_whole_vocabulary_is_the_plain_divergence(kind, tau):
    """K = V in any order of the teacher's entries is the divergence of the two log-softmaxes."""
    student, teacher, targets = make_case(7, 30, 30, tau=tau)
    divergence = make_divergence(kind, beta=BETA, alpha=ALPHA)
    expected = divergence((teacher / tau).log_softmax(-1), (student / tau).log_softmax(-1))
    torch.testing.assert_close(token_loss(kind, temperature=tau)(student, targets), expected)


def test_kl_is_torchs_kl():
    student, teacher, targets = make_case(7, 30, 30)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for kind, target, given_ in (("forward_kl", p, q), ("reverse_kl", q, p)):
        full = torch.nn.functional.kl_div(given_, target, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(token_loss(kind)(student, targets), full)


@every_loss
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 4),
    vocab=st.integers(2, 24),
    scale=st.sampled_from([0.0, 0.5, 3.0, 8.0]),
    tau=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_shape(kind, tokens, vocab, scale, tau, seed, data):
    """Agrees with the reference and is not negative, however little mass the tails have."""
    top_k = data.draw(st.integers(1, vocab))
    student, teacher, targets = make_case(tokens, vocab, top_k, seed, scale, tau)
    value = token_loss(kind, temperature=tau)(student, targets)
    assert value.shape == (tokens,)
    assert value.isfinite().all() and (value > -1e-5).all()
    if tokens:
        expected = slow_loss(kind, student, teacher, targets, tau)
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-3)


# --- categories ---


# The head of the adaptive KL is chosen on the categories, so joining them may raise it.
every_bound = pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind != "adaptive_kl"])


@every_bound
@settings(max_examples=40, deadline=None)
@given(vocab=st.integers(2, 24), scale=st.sampled_from([0.5, 3.0, 8.0]), seed=st.integers(0, 10**6))
def test_joining_categories_never_raises_it(kind, vocab, scale, seed):
    """A smaller K is a coarser view."""
    previous = torch.full((3,), -1e-5)
    for top_k in range(1, vocab + 1):
        student, _, targets = make_case(3, vocab, top_k, seed, scale)
        value = token_loss(kind)(student, targets)
        assert (value >= previous - 2e-5 - 1e-5 * previous.abs()).all()
        previous = value


@every_bound
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.5, 1.0, 2.0]), data=st.data())
def test_joining_any_two_categories_never_raises_it(kind, seed, tau, data):
    student, _, targets = make_case(5, 12, 4, seed, 3.0, tau)
    log_p, log_q = categories(student, targets, tau)
    first, second = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True))
    others = [c for c in range(6) if c not in (first, second)]
    joined = [
        torch.cat([x[:, others], torch.logaddexp(x[:, first], x[:, second])[:, None]], 1) for x in (log_p, log_q)
    ]
    divergence = make_divergence(kind, beta=BETA, alpha=ALPHA)
    fine, coarse = divergence(log_p, log_q), divergence(*joined)
    assert (coarse <= fine + 1e-5 + 1e-5 * fine.abs()).all()


@temperatures
def test_categories_are_distributions(tau):
    student, teacher, targets = make_case(12, 14, 4, tau=tau)
    log_p, log_q = categories(student, targets, tau)
    assert log_p.shape == log_q.shape == (12, 6)
    for found, reference in ((log_p, 0), (log_q, 1)):
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(12))
        for n, pair in enumerate(slow_pairs(student, teacher, targets, tau)):
            own = found[n].double().exp()
            torch.testing.assert_close(own[own > 0], pair[reference], atol=1e-7, rtol=1e-4)


@every_divergence
@temperatures
def test_token_inside_the_top_k_adds_no_category(kind, tau):
    """Value and gradient are the same for every token of the K, and there is no NaN in them."""
    student, teacher = make_logits(3, 12)
    found = []
    for rank in range(4):
        logits = student.clone().requires_grad_()
        targets = record(teacher, 4, tau, teacher.topk(4).indices[:, rank].tolist())
        assert (categories(logits, targets, tau)[1][:, -2] == -math.inf).all()
        value = token_loss(kind, temperature=tau)(logits, targets)
        value.sum().backward()
        found.append(torch.cat([value.detach()[:, None], logits.grad], 1))
    assert torch.stack(found).isfinite().all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def union_case(top_k: int, own: int, tau: float = 1.0, vocab: int = 16):
    """Entries of both models; some of the student's are the teacher's, and some the emitted token."""
    student, teacher, plain = make_case(12, vocab, top_k, tau=tau)
    students = student.topk(own).indices
    return student, teacher, plain, record(teacher, top_k, tau, plain.token_N.tolist(), students)


@every_loss
@temperatures
@pytest.mark.parametrize(("top_k", "own"), [(1, 1), (4, 3), (6, 12), (16, 5), (4, 16)])
def test_entries_of_the_student(kind, tau, top_k, own):
    """Value against the reference on the union, gradient against its finite differences, and no NaN in either."""
    student, teacher, _, targets = union_case(top_k, own, tau)
    assert (targets.teacher_ids_NK == NOTHING).any()
    assert top_k == 16 or (targets.teacher_ids_NK[:, top_k:] >= 0).any()
    student = student.double().requires_grad_()
    value = token_loss(kind, temperature=tau)(student, targets)
    value.sum().backward()
    shares = [slow_head_share(*pair) for pair in slow_pairs(student.detach(), teacher, targets, tau)]
    expected = slow_loss(kind, student.detach(), teacher, targets, tau, shares)
    torch.testing.assert_close(value.detach(), expected, atol=3e-6, rtol=1e-4)
    step = 1e-5
    for v in range(0, 16, 5):
        shift = torch.zeros(16, dtype=torch.float64)
        shift[v] = step
        up, down = (slow_loss(kind, student.detach() + s, teacher, targets, tau, shares) for s in (shift, -shift))
        torch.testing.assert_close(student.grad[:, v], (up - down) / (2 * step), atol=3e-6, rtol=3e-4)


@every_bound
@pytest.mark.parametrize(("top_k", "own"), [(1, 1), (4, 4), (2, 9)])
def test_entries_of_the_student_bring_it_nearer_to_the_whole(kind, top_k, own):
    """Never below the value without them, never above that over the vocabulary."""
    student, teacher, plain, targets = union_case(top_k, own)
    loss = token_loss(kind)
    whole = loss(student, record(teacher, 16, tokens=plain.token_N.tolist()))
    without, with_them = loss(student, plain), loss(student, targets)
    assert (without <= with_them + 1e-5).all() and (with_them <= whole + 1e-5).all()
    assert (with_them > without + 1e-3).any()


def test_a_token_that_only_the_student_likes_is_seen_by_the_reverse_kl():
    """Two students with the same mass outside the teacher's first: only its own entry tells them apart."""
    teacher = torch.tensor([[5.0, 4.0, -1.0, -6.0, -1.0, -1.0]])
    values = {}
    for favourite, other in ((2, 3), (3, 2)):
        student = teacher.clone()
        student[0, favourite], student[0, other] = 6.0, -1.0
        for own in (None, student.topk(1).indices):
            targets = record(teacher, 2, students=own)
            values[favourite, own is None] = token_loss("reverse_kl")(student, targets).item()
    assert abs(values[3, True] - values[2, True]) < 1e-5
    assert values[3, False] > values[2, False] + 1


def test_token_outside_the_top_k_is_taught_itself():
    """Two students with the same mass outside the top-K: only the category of the token tells them apart."""
    teacher = torch.tensor([[4.0, 3.0, 2.0, 0.0, 0.0, 0.0]])
    targets = record(teacher, 2, tokens=[2])
    fitting, other = teacher.clone(), teacher.clone()
    other[0, [2, 3]] = teacher[0, [3, 2]]  # the student confuses it with its neighbour
    assert token_loss("forward_kl")(fitting, targets).abs() < 1e-6
    other.requires_grad_()
    value = token_loss("forward_kl")(other, targets)
    assert value > 0.05
    value.sum().backward()
    assert other.grad[0, 2] < -0.05 < 0.01 < other.grad[0, 3]


@every_divergence
@pytest.mark.parametrize("others", [-20.0, -60.0, -1e4], ids=["tiny", "below float32", "none"])
def test_tail_that_is_the_token_alone(kind, others):
    """What is left beside the token is nothing to float32, which must not be seen: it is summed up by itself."""
    teacher = torch.full((2, 9), others)
    teacher[:, :3] = torch.tensor([3.0, 2.0, 1.0])
    student = make_logits(2, 9)[0].requires_grad_()
    targets = record(teacher, 2, tokens=[2, 2])
    value = token_loss(kind)(student, targets)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all() and (value > 0).all()
    if others > -700:  # more than float64 knows to be nothing
        expected = slow_loss(kind, student.detach(), teacher, targets)
        torch.testing.assert_close(value.detach().double(), expected, atol=1e-5, rtol=1e-4)


# --- temperature ---


@every_divergence
@pytest.mark.parametrize("top_k", [1, 6, 19, 20])
@pytest.mark.parametrize("tau", [0.5, 2.0, 10.0])
def test_temperature_is_that_of_both_models(kind, top_k, tau):
    """Teacher and student that are softer by themselves have the same loss at temperature 1."""
    student, _, targets = make_case(6, 20, top_k, tau=tau)
    _, teacher = make_logits(6, 20)
    soft = record(teacher / tau, top_k, 1.0, targets.token_N.tolist())
    expected = token_loss(kind)(student / tau, soft)
    torch.testing.assert_close(token_loss(kind, temperature=tau)(student, targets), expected, atol=2e-6, rtol=1e-4)


@every_divergence
def test_temperature_one_is_no_temperature(kind):
    student, _, targets = make_case(6, 20, 5)
    plain = top_k_loss(make_divergence(kind, beta=BETA, alpha=ALPHA))
    torch.testing.assert_close(token_loss(kind, temperature=1.0)(student, targets), plain(student, targets))


def test_no_factor_of_tau_squared():
    """At a high temperature KL falls as 1 / tau^2; nothing puts that back."""
    values = []
    for tau in (20.0, 40.0):
        student, _, targets = make_case(4, 12, 12, scale=1.0, tau=tau)
        values.append(token_loss("forward_kl", temperature=tau)(student.double(), targets))
    torch.testing.assert_close(values[0] / values[1], torch.full((4,), 4.0, dtype=torch.float64), rtol=0.05, atol=0)


# --- limits ---


@pytest.mark.parametrize("beta", [1e-3, 1e-4])
def test_jsd_tends_to_the_two_kls(beta):
    student, _, targets = make_case(6, 20, 5, scale=1.0)
    student = student.double()
    forward, reverse = (token_loss(kind)(student, targets) for kind in ("forward_kl", "reverse_kl"))
    small, large = (token_loss("jsd", beta=b)(student, targets) / beta for b in (beta, 1 - beta))
    torch.testing.assert_close(small, forward, atol=0, rtol=30 * beta + 2e-3)
    torch.testing.assert_close(large, reverse, atol=0, rtol=30 * beta + 2e-3)


def test_jsd_is_symmetric_at_one_half_and_bounded_by_ln_2():
    teacher = make_logits(6, 20, scale=50.0)[1]
    student = make_logits(6, 20, seed=1, scale=50.0)[0]
    one = token_loss("jsd", beta=0.5)(student, record(teacher, 20))
    two = token_loss("jsd", beta=0.5)(teacher, record(student, 20))
    torch.testing.assert_close(one, two)
    assert (one <= math.log(2) + 1e-5).all() and one.max() > 0.6


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_skew_zero_is_the_kl(kind):
    student, _, targets = make_case(6, 20, 5)
    skewed = token_loss(f"skew_{kind}", alpha=0.0)(student, targets)
    torch.testing.assert_close(skewed, token_loss(kind)(student, targets))


# --- robustness ---


@every_loss
@pytest.mark.parametrize("top_k", [1, 3, 7, 8])
@pytest.mark.parametrize("token", [0, 5, 7])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits_stay_finite(kind, top_k, token, scale):
    """Student sure of a token that the teacher is sure not to take, and the other way round."""
    teacher = torch.zeros(3, 8)
    teacher[:, 0] = scale
    student = torch.zeros(3, 8)
    student[0, 5], student[1, 0], student[2, 0] = scale, scale, -scale
    student.requires_grad_()
    value = token_loss(kind)(student, record(teacher, top_k, tokens=[token] * 3))
    value.sum().backward()
    assert value.isfinite().all() and (value > -1e-5).all()
    assert student.grad.isfinite().all()
    if kind == "forward_kl":
        assert value[0] > 0.9 * scale, "the student's wrong certainty costs its full log-ratio"
        assert student.grad[0, 0] < -0.9, "and is pushed back with full strength"


@every_divergence
def test_the_tail_has_a_gradient(kind):
    """Mass that the student moves outside the teacher's top-K costs, though nothing there is listed."""
    teacher = make_logits(1, 16)[1]
    targets = record(teacher, 4)
    outside = next(v for v in range(16) if v not in targets.teacher_ids_NK)
    student = torch.zeros(1, 16)
    student[0, outside] = 5.0
    student.requires_grad_()
    token_loss(kind)(student, targets).sum().backward()
    assert student.grad[0, outside] > 0


@every_loss
def test_half_precision_logits_are_computed_in_float32(kind):
    student, _, targets = make_case(4, 20, 5)
    value = token_loss(kind)(student.to(torch.bfloat16), targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, token_loss(kind)(student.to(torch.bfloat16).float(), targets))


@every_loss
@pytest.mark.parametrize("padding", [0.0, 1e9, -math.inf, math.nan])
@pytest.mark.parametrize("top_k", [3, 15, 16])
def test_rows_beyond_the_common_vocabulary_do_not_exist(kind, padding, top_k):
    """Whatever the padding rows of the student say: the same value, and not the least gradient for them."""
    student, _, targets = make_case(5, 16, top_k)
    options = dict(replaced_kind="reverse_kl", replaced_weight=0.5)
    targets = with_sources(targets, [0, 1, 0, 1, 0])
    bare = student.clone().requires_grad_()
    expected = token_loss(kind, **options)(bare, targets)
    expected.sum().backward()
    padded = torch.cat([student, torch.full((5, 4), padding)], 1).requires_grad_()
    value = token_loss(kind, **options, vocab=16)(padded, targets)
    value.sum().backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(padded.grad[:, :16], bare.grad, rtol=0, atol=0)
    assert (padded.grad[:, 16:] == 0).all()


def test_student_with_fewer_rows_than_the_teacher():
    """The teacher's record is restricted to the student's rows, and there is nothing to cut off."""
    student, teacher, targets = make_case(5, 16, 4)
    wide = torch.cat([teacher, torch.full((5, 6), 3.0)], 1)
    restricted = record(wide[:, :16], 4, tokens=targets.token_N.tolist())
    value = token_loss("forward_kl", vocab=16)(student, restricted)
    torch.testing.assert_close(
        value.double(), slow_loss("forward_kl", student, teacher, targets), atol=3e-6, rtol=1e-4
    )


# --- hard labels, provenance, clamp ---


def with_sources(targets: Targets, codes: list[int]) -> Targets:
    return Targets(**vars(targets) | {"source_N": torch.tensor(codes, dtype=torch.uint8)})


def test_cross_entropy_is_torchs():
    student, _, targets = make_case(7, 30, 5)
    expected = torch.nn.functional.cross_entropy(student, targets.token_N, reduction="none")
    torch.testing.assert_close(token_loss("cross_entropy")(student, targets), expected)


def test_hard_label_has_no_temperature():
    student, _, targets = make_case(7, 30, 5, tau=3.0)
    hot = token_loss("forward_kl", replaced_kind="cross_entropy", temperature=3.0)
    targets = with_sources(targets, [Source.REPLACED] * 7)
    torch.testing.assert_close(hot(student, targets), token_loss("cross_entropy")(student, targets))


CODES = [
    Source.ACCEPTED, Source.REPLACED, Source.UNDRAFTED, Source.REFERENCE, Source.RESAMPLED, Source.FLAGGED,
    Source.HANDED, Source.ACCEPTED,
]  # fmt: skip


@every_loss
@pytest.mark.parametrize("replaced_kind", [None, "cross_entropy", "reverse_kl"])
def test_provenance_against_a_plain_loop(kind, replaced_kind):
    student, _, targets = make_case(8, 20, 5, tau=2.0)
    targets = with_sources(targets, CODES)
    student.requires_grad_()
    options = dict(replaced_kind=replaced_kind, temperature=2.0)
    # Between two values, so that no row's own rounding decides on which side of it a token lies.
    limit = token_loss(kind, **options)(student, targets).sort().values[3:5].mean().item()
    weights = dict(accepted_weight=0.5, replaced_weight=3.0, handed_weight=2.0)
    value = token_loss(kind, **options, **weights, clamp=limit)(student, targets)
    value.sum().backward()
    gradient, student.grad = student.grad, None
    expected = []
    for n, code in enumerate(CODES):
        replaced = code in (Source.REPLACED, Source.FLAGGED, Source.HANDED)
        own_kind = replaced_kind or kind if replaced else kind
        row = torch.tensor([n])
        own = token_loss(own_kind, temperature=2.0)(student[row], targets.select(row))[0]
        weight = {Source.HANDED: 2.0}.get(code, 3.0 if replaced else 0.5)
        expected.append(weight * (own if own <= limit else torch.tensor(limit)))
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(value, torch.stack(expected))
    torch.testing.assert_close(gradient, student.grad)


REGION_OF = {  # the definition of each, of one token: log p, log q, H(p), source
    "replaced": lambda p, q, h, s: s in (Source.REPLACED, Source.FLAGGED, Source.HANDED),
    "handed": lambda p, q, h, s: s == Source.HANDED,
    "distrusted": lambda p, q, h, s: min(math.exp(p - q), 1) < 0.4,
    "flat": lambda p, q, h, s: h > 2.1,
}
THRESHOLDS = {"distrusted": 0.4, "flat": 2.1}


def region_case() -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Tokens of every region, and of several; of one nothing is known of the student."""
    student, teacher, targets = make_case(24, 20, 5, tau=2.0)
    logq = student.log_softmax(-1).gather(1, targets.token_N[:, None]).squeeze(1) + torch.linspace(0, 1, 24)
    logq[3] = math.nan
    return student, teacher, replace(with_sources(targets, CODES * 3), token_student_logp_N=logq)


def region_members(name: str, targets: Targets) -> list[bool]:
    columns = (targets.token_teacher_logp_N, targets.token_student_logp_N, targets.teacher_entropy_N, targets.source_N)
    rows = zip(*(x.double().tolist() for x in columns), strict=True)
    return [False if math.isnan(row[1]) and name == "distrusted" else REGION_OF[name](*row) for row in rows]


@pytest.mark.parametrize("name", REGIONS)
def test_regions_are_those_of_their_definition(name):
    _, _, targets = region_case()
    expected = region_members(name, targets)
    assert REGIONS[name].test(THRESHOLDS.get(name))(targets).tolist() == expected
    assert 1 < sum(expected) < 23


def test_regions_in_order_against_a_plain_loop():
    """Value and gradient: reverse KL, with the forward KL on outliers, another on flat places, and labels on legs."""
    student, _, targets = region_case()
    chosen = {"handed": "cross_entropy", "distrusted": "forward_kl", "flat": "jsd"}
    regions = tuple(RegionSettings(name, kind, THRESHOLDS.get(name)) for name, kind in chosen.items())
    student = student.double().requires_grad_()
    loss = token_loss("reverse_kl", regions=regions, temperature=2.0)
    value = loss(student, targets)
    value.sum().backward()
    gradient, student.grad = student.grad, None
    members = {name: region_members(name, targets) for name in chosen}
    expected, used = [], set()
    for n in range(24):
        kind = next((kind for name, kind in chosen.items() if members[name][n]), "reverse_kl")
        row = torch.tensor([n])
        expected.append(token_loss(kind, temperature=2.0)(student[row], targets.select(row))[0])
        used.add(kind)
    assert len(used) == 4
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(value, torch.stack(expected))
    torch.testing.assert_close(gradient, student.grad)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), student.detach().requires_grad_())


def test_replaced_kind_is_the_region_of_replaced_tokens():
    student, _, targets = region_case()
    short = token_loss("jsd", replaced_kind="cross_entropy")(student, targets)
    long = token_loss("jsd", regions=(RegionSettings("replaced", "cross_entropy"),))(student, targets)
    assert torch.equal(short, long)


@pytest.mark.parametrize("code", [Source.ACCEPTED, Source.REPLACED])
def test_only_one_origin(code):
    """The loss of the other origin has no token at all."""
    student, _, targets = make_case(4, 20, 5)
    student.requires_grad_()
    value = token_loss("jsd", replaced_kind="cross_entropy")(student, with_sources(targets, [code] * 4))
    value.sum().backward()
    own = "jsd" if code == Source.ACCEPTED else "cross_entropy"
    torch.testing.assert_close(value, token_loss(own)(student, targets))
    assert student.grad.abs().sum() > 0


def test_weight_zero_is_no_gradient():
    student, _, targets = make_case(4, 20, 5)
    student.requires_grad_()
    loss = token_loss("forward_kl", replaced_weight=0.0)
    loss(student, with_sources(targets, [0, 1, 0, 5])).sum().backward()
    assert (student.grad.abs().sum(1) > 0).tolist() == [True, False, True, False]


def test_clamp_has_no_gradient_above_it():
    student, _, targets = make_case(8, 20, 5)
    student.requires_grad_()
    plain = token_loss("forward_kl")(student, targets)
    limit = plain.sort().values[3:5].mean().item()  # between two tokens
    value = token_loss("forward_kl", clamp=limit)(student, targets)
    torch.testing.assert_close(value, plain.clamp(max=limit))
    value.sum().backward()
    assert ((student.grad != 0).any(1) == (plain < limit)).all() and 0 < (plain < limit).sum() < 8


@every_loss
def test_no_token_at_all(kind):
    """A batch whose response tokens are all masked has a value that still has a graph."""
    student, _, targets = make_case(0, 20, 5)
    student.requires_grad_()
    options = dict(replaced_kind="reverse_kl", replaced_weight=2.0, clamp=1.0, temperature=2.0, vocab=18)
    value = token_loss(kind, **options)(student, targets)
    assert value.shape == (0,)
    value.sum().backward()
    assert student.grad.shape == (0, 20)


# --- distributions with empty places, and extreme ones ---

V = 8
MASKED = [2, 5]


def hostile(name: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits of student and teacher float64 [4, V], and the emitted tokens."""
    student, teacher = (x.double() for x in make_logits(4, V, seed=3))
    tokens = [0, 1, 3, 7]
    for which, x in (("student", student), ("teacher", teacher)):
        if name in (f"{which} masked", "both masked"):
            x[:, MASKED] = -math.inf
        if name in (f"{which} sure", "both sure", "sure of different tokens"):
            best = [(n + (which == "student" and name.startswith("sure"))) % V for n in range(4)]
            x.fill_(-math.inf).scatter_(1, torch.tensor(best)[:, None], 0.0)
        if name in (f"{which} at 1e4", "both at 1e4"):
            x.copy_((x + x.sign() * 1e4).roll(int(which == "teacher"), 1).float())
    if name == "masked, then equal":
        student[:, MASKED] = -math.inf
        teacher = student + 2.0
    if name == "equal":
        teacher = student.clone()
    if name == "label masked":
        student[:, MASKED], tokens = -math.inf, [2, 5, 2, 5]
    return student, teacher, tokens


HOSTILE = [
    "both masked", "teacher masked", "student masked", "label masked", "teacher sure", "student sure", "both sure",
    "sure of different tokens", "teacher at 1e4", "student at 1e4", "both at 1e4", "masked, then equal", "equal",
]  # fmt: skip


def groups(ids: list[int], token: int) -> list[list[int]]:
    named = ids if token in ids else [*ids, token]
    return [[v] for v in named] + [[v for v in range(V) if v not in named]]


def closed_form(kind: str, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Value, and q_c x (its derivative to q_c), of one row of categories: no autograd. A place without mass adds 0."""
    p, q = log_p.exp(), log_q.exp()

    def mean_ratio(mass: torch.Tensor, log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return torch.where(mass > 0, mass * (log_a - log_b), 0.0)

    def mixture(share: float) -> torch.Tensor:
        return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))

    def share_of_mass(log_m: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        return torch.where(mass > 0, (log_q - log_m).exp(), 0.0)

    forward = mean_ratio(p, log_p, log_q).sum(), -p
    reverse = mean_ratio(q, log_q, log_p).sum(), mean_ratio(q, log_q, log_p) + q
    if kind == "forward_kl":
        return forward
    if kind == "reverse_kl":
        return reverse
    if kind == "total_variation":
        return 0.5 * (p - q).abs().sum(), 0.5 * (q - p).sign() * q
    if kind == "jsd":
        m = mixture(BETA)
        value = BETA * mean_ratio(p, log_p, m).sum() + (1 - BETA) * mean_ratio(q, log_q, m).sum()
        return value, (1 - BETA) * mean_ratio(q, log_q, m)
    if kind == "skew_forward_kl":
        m = mixture(ALPHA)
        return mean_ratio(p, log_p, m).sum(), -(1 - ALPHA) * p * share_of_mass(m, p)
    if kind == "skew_reverse_kl":
        m = mixture(1 - ALPHA)
        return mean_ratio(q, log_q, m).sum(), mean_ratio(q, log_q, m) + q * (1 - ALPHA * share_of_mass(m, q))
    share = {"symmetric_kl": 0.5}.get(kind) or slow_head_share(p, q)
    parts = [(w, kl) for w, kl in ((share, forward), (1 - share, reverse)) if w > 0]
    return sum(w * value for w, (value, _) in parts), sum(w * slope for w, (_, slope) in parts)


def closed_form_row(kind: str, student, teacher, ids: list[int], token: int, tau: float):
    """(value, gradient to the V logits) of one position, float64."""
    if kind == "cross_entropy":
        log_q = student.log_softmax(-1)
        return -log_q[token], log_q.exp() - torch.nn.functional.one_hot(torch.tensor(token), V)
    log_q, log_p = (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
    parts = [part for part in groups(ids, token) if part]
    joined = [torch.stack([x[part].logsumexp(0) for part in parts]) for x in (log_p, log_q)]
    value, slope = closed_form(kind, *joined)
    gradient = -log_q.exp() * slope.sum()
    for part, log_mass, own in zip(parts, joined[1], slope, strict=True):
        inside = (log_q[part] - log_mass).exp() if log_mass > -math.inf else torch.zeros(len(part)).double()
        gradient[part] += inside * own
    return value, gradient / tau


BOUNDED = ["jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
every_hostile = pytest.mark.parametrize("name", HOSTILE)


@every_loss
@every_hostile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_empty_places_and_extreme_logits(kind, name, dtype):
    """Value and gradient are right and finite; a value that is infinite by definition is inf, and its gradient is
    finite.
    """
    student, teacher, tokens = hostile(name)
    student = student.to(dtype)
    for tau in (1.0, 2.0):
        for top_k in (1, 3, V - 1, V):
            targets = record(teacher.float(), top_k, tau, tokens)
            logits = torch.nn.functional.pad(student, (0, 3), value=math.nan).requires_grad_()
            value = token_loss(kind, temperature=tau, vocab=V)(logits, targets)
            value.sum().backward()
            rows = zip(student.double(), teacher, targets.teacher_ids_NK.tolist(), tokens, strict=True)
            expected, gradients = zip(*(closed_form_row(kind, *row, tau) for row in rows), strict=True)
            expected, gradients = torch.stack(expected), torch.stack(gradients)
            assert logits.grad.isfinite().all()
            # float32 knows numbers of 1e4 to 1e-3, and bfloat16 gradients have three digits
            coarse = 5e-3 if "1e4" in name and dtype != torch.float64 else 2e-5
            torch.testing.assert_close(value.detach().double(), expected, atol=coarse, rtol=max(coarse, 2e-4))
            known = expected.isfinite()
            assert known.all() or kind not in BOUNDED
            if kind == "total_variation":  # it has a kink at 0
                known &= expected > 1e-6
            if known.any():
                error = 2e-2 if dtype == torch.bfloat16 else coarse
                largest = gradients[known].abs().max().clamp_min(1.0)
                assert (logits.grad[known, :V] - gradients[known]).abs().max() <= error * largest


@every_loss
@every_hostile
def test_everything_composed_is_finite(kind, name):
    """A clamp makes an infinite loss a bounded one without a gradient, and a weight of 0 makes it 0."""
    student, teacher, tokens = hostile(name)
    for divergence_of in ("top_k", "vocabulary"):
        for options in (dict(), dict(replaced_kind="reverse_kl"), dict(replaced_kind="cross_entropy")):
            targets = with_sources(record(teacher.float(), 3, 2.0, tokens), [0, 1, 0, 5])
            logits = student.float().requires_grad_()
            chosen = LossSettings(kind, BETA, ALPHA, temperature=2.0, clamp=9.0, replaced_weight=2.0, **options)
            if divergence_of == "top_k":
                value = make_token_loss(chosen, vocab=V)(logits, targets)
            else:
                targets = replace(targets, teacher_logp_NK=teacher.float().log_softmax(-1))
                value = make_token_loss(chosen, against=whole_vocabulary_loss)(logits.log_softmax(-1), targets)
            value.sum().backward()
            assert value.isfinite().all() and logits.grad.isfinite().all()
            assert (logits.grad[value >= torch.tensor([9.0, 18.0, 9.0, 18.0])] == 0).all()


@every_loss
@every_hostile
def test_weight_zero_of_an_infinite_loss(kind, name):
    student, teacher, tokens = hostile(name)
    targets = with_sources(record(teacher.float(), 3, tokens=tokens), [0, 0, 0, 0])
    logits = student.float().requires_grad_()
    value = token_loss(kind, accepted_weight=0.0)(logits, targets)
    value.sum().backward()
    assert (value == 0).all() and (logits.grad == 0).all()


@every_divergence
def test_a_student_that_is_nan_is_not_hidden(kind):
    """What lets empty places pass lets no fault pass."""
    student, teacher, tokens = hostile("both masked")
    student[1, 0] = math.nan
    value = token_loss(kind)(student.float(), record(teacher.float(), 3, tokens=tokens))
    assert value.isnan().tolist() == [False, True, False, False]


@every_loss
def test_a_student_without_a_token_is_nan_and_spoils_no_other(kind):
    """All its logits are -inf: it has no distribution, and 0 / 0 is what every loss says of it."""
    student, teacher, tokens = hostile("both masked")
    targets = record(teacher.float(), 3, tokens=tokens)
    expected = token_loss(kind)(student.float(), targets)
    student[1] = -math.inf
    logits = student.float().requires_grad_()
    for against in (top_k_loss, whole_vocabulary_loss):
        chosen = LossSettings(kind, BETA, ALPHA)
        full = targets if against is top_k_loss else replace(targets, teacher_logp_NK=teacher.float().log_softmax(-1))
        log_q = logits if against is top_k_loss else logits.log_softmax(-1)
        value = make_token_loss(chosen, against=against)(log_q, full)
        assert value.isnan().tolist() == [False, True, False, False]
        if against is top_k_loss:
            torch.testing.assert_close(value[[0, 2, 3]], expected[[0, 2, 3]])
        logits.grad = None
        value[[0, 2, 3]].sum().backward()
        assert logits.grad[[0, 2, 3]].isfinite().all()


def test_unknown_loss():
    with pytest.raises(KeyError):
        make_divergence("no_such_kind", beta=0.5, alpha=0.1)
    with pytest.raises(ValueError, match="cross_entropy is a loss of the emitted token and no divergence"):
        make_divergence("cross_entropy", beta=0.5, alpha=0.1)
    with pytest.raises(KeyError):
        token_loss("forward_kl", replaced_kind="no_such_kind")
