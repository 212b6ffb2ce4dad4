"""Every gate against its definition, token by token, in float64 and plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.core import rng, sampling
from skd_plugin.core.blend import geometric_blend
from skd_plugin.core.gates import GATES, in_top_k
from skd_plugin.core.logit_rows import LogitRows, rank
from skd_plugin.core.proposals import Proposals, decayed_top_k
from skd_plugin.core.sampling import SamplingSettings, SettingRows
from skd_plugin.core.trace import Source
from skd_plugin.core.verify import assemble_block, judge

VOCAB = 12
SETTINGS = {
    "top_k": 0.0, "ask_again": 0.0, "top_p": 0.6, "floor": 0.05, "typical": 0.09, "confident": 0.2,
    "confident_margin": 0.15, "confident_entropy": 1.6, "top_k_of_nucleus": 0.0, "foreseen": 0.0,
}  # fmt: skip
NUCLEUS = 0.5  # of the teacher; only the last gate looks at it
TOP_K = 3


def proposals(seed: int, threshold: float, top_k: int = TOP_K, repeat: int = 1, **settings: float) -> Proposals:
    """One prefix; every token of the vocabulary is proposed, `repeat` times."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(VOCAB, generator=generator) * 1.5 for _ in range(2))
    count = VOCAB * repeat
    return Proposals(
        draft_N=torch.arange(VOCAB).repeat_interleave(repeat),
        teacher=LogitRows.of(teacher.expand(count, -1)),
        student=LogitRows.of(student.expand(count, -1)),
        position_N=torch.arange(count),
        seed_N=torch.full((count,), seed),
        prompt_len_N=torch.zeros(count, dtype=torch.int64),
        settings=SettingRows.of([SamplingSettings(top_k, threshold=threshold, **settings)] * count, "cpu"),
    )


def untempered(case: Proposals) -> tuple[list[float], list[float]]:
    """p1 and q1 in float64."""
    return tuple(x[0].double().softmax(-1).tolist() for x in (case.teacher_logits_NV, case.student_logp_NV))


def accept_set(gate: str, threshold: float, p: list[float], q: list[float]) -> set[int]:
    order = sorted(range(VOCAB), key=lambda v: -p[v])
    top_k = set(order[:TOP_K])
    if gate in ("top_k", "ask_again"):
        return top_k
    if gate == "top_k_of_nucleus":
        return {v for place, v in enumerate(order) if sum(p[u] for u in order[:place]) < NUCLEUS} & top_k
    if gate == "foreseen":
        return set(order) if order[0] in sorted(range(VOCAB), key=lambda v: -q[v])[:TOP_K] else {order[0]}
    first, second = sorted(q, reverse=True)[:2]
    everything = set(order)
    if gate == "confident_margin":
        return everything if first - second >= threshold else top_k
    if gate == "confident_entropy":
        return everything if -sum(x * math.log(x) for x in q) <= threshold else top_k
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
    case = proposals(seed, SETTINGS[gate], teacher_top_p=NUCLEUS)
    kept = set(GATES[gate].keep(case).nonzero().squeeze(1).tolist())
    assert kept == accept_set(gate, SETTINGS[gate], *untempered(case))


def test_sets_of_the_test_are_not_trivial():
    """Else the test above would not tell the gates apart."""
    for gate, threshold in SETTINGS.items():
        sizes = [len(accept_set(gate, threshold, *untempered(proposals(seed, threshold)))) for seed in range(8)]
        assert min(sizes) > 0 and min(sizes) < VOCAB, gate
        assert gate in ("top_k", "ask_again") or len(set(sizes)) > 1, gate


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
        ("confident_margin", 0.0, 0, True),
        ("confident_margin", 1.1, 0, False),
        ("confident_entropy", math.log(VOCAB), 0, True),
        ("confident_entropy", 0.0, 0, False),
        ("foreseen", 0.0, VOCAB, True),
        ("ask_again", 0.0, VOCAB, True),
        ("ask_again", 0.0, 0, False),
        ("chance", 0.0, 0, True),
        ("chance", 1.0, VOCAB, False),
        ("interpolated", 0.0, 0, True),
        ("blended", 0.0, 0, True),
    ],
)
def test_end_points_are_the_student_and_the_teacher(gate, threshold, top_k, kept):
    assert (GATES[gate].keep(proposals(1, threshold, top_k)) == kept).all()


@pytest.mark.parametrize(
    ("gate", "threshold"), [("confident", 1.1), ("confident_margin", 1.1), ("confident_entropy", 0)]
)
def test_a_student_that_is_never_sure_is_put_to_top_k(gate, threshold):
    case = proposals(2, threshold)
    assert torch.equal(GATES[gate].keep(case), GATES["top_k"].keep(case))


def verdict_frequencies(gate: str, case: Proposals) -> torch.Tensor:
    """Frequencies [3, V] of (provenance, token), each token proposed as often as the student would: weighted by q."""
    verdict = judge(GATES[gate], case)
    q = case.student_probs_NV[0].double()
    weight = q[case.draft_N] / torch.bincount(case.draft_N, minlength=VOCAB)[case.draft_N]
    order = (Source.ACCEPTED, Source.REPLACED, Source.RESAMPLED)
    rows = torch.tensor([order.index(source) for source in verdict.source_N.tolist()])
    return torch.zeros(3 * VOCAB, dtype=torch.float64).index_add(0, rows * VOCAB + verdict.token_N, weight).view(3, -1)


def test_asked_again_the_student_stays_inside():
    """m(v) = 1[v in A] q(v) / S, with the student's own temperature, and no token from the teacher."""
    case = proposals(4, 0.0, repeat=3000, student_temperature=0.8, teacher_temperature=0.5)
    kept, replaced, again = verdict_frequencies("ask_again", case)
    p, _ = untempered(case)
    inside = torch.zeros(VOCAB, dtype=torch.float64)
    inside[sorted(range(VOCAB), key=lambda v: -p[v])[:TOP_K]] = 1
    q = case.student_probs_NV[0].double() * inside
    assert replaced.sum() == 0
    torch.testing.assert_close(kept, q, atol=1e-6, rtol=0)
    torch.testing.assert_close(again, q / q.sum() * (1 - q.sum()), atol=0.01, rtol=0)


def test_asked_again_without_mass_inside_the_teacher_answers():
    """The student is certain of a token that the teacher ranks last."""
    case = proposals(4, 0.0, student_temperature=0.0)
    worst = int(case.teacher_logits_NV[0].argmin())
    logp = torch.full((VOCAB, VOCAB), -50.0)
    logp[:, worst] = 0.0
    sure = replace(case, student=LogitRows.of(logp), draft_N=torch.full((VOCAB,), worst))
    assert (judge(GATES["ask_again"], sure).source_N == Source.REPLACED).all()


@pytest.mark.parametrize("first", [rng.STUDENT, rng.TEACHER, rng.COIN])
def test_the_students_second_answer_has_its_own_random_numbers(first):
    """It equals a draw of another stream as often as two independent ones are equal."""
    case = proposals(4, 0.0, top_k=VOCAB, repeat=1000)
    drawn = sampling.draw(case.student_probs_NV, rng.uniform(case.seed_N, case.position_N, first))
    again = judge(replace(GATES["ask_again"], keep=lambda p: p.rank_N < 0), case)
    assert (again.source_N == Source.RESAMPLED).all()
    expected = (case.student_probs_NV[0] ** 2).sum().item()
    assert abs((again.token_N == drawn).double().mean().item() - expected) < 5 * math.sqrt(0.25 / len(drawn))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.lists(st.integers(-2, 2), min_size=5, max_size=5), st.integers(0, 7)), min_size=1))
def test_in_top_k_of_rows_with_ties(rows):
    """The lower id goes first among equals, as in a rank."""
    logits, top_k = torch.tensor([row for row, _ in rows]).float(), torch.tensor([k for _, k in rows])
    ranks = torch.stack([rank(logits, torch.full((len(rows),), token)) for token in range(5)], dim=1)
    assert torch.equal(in_top_k(logits, top_k, int(top_k.max())), ranks < top_k[:, None])


@pytest.mark.parametrize("gate", SETTINGS)
def test_verdict_keeps_the_proposal_or_names_what_took_its_place(gate):
    case = proposals(9, SETTINGS[gate], repeat=20)
    verdict, kept = judge(GATES[gate], case), GATES[gate].keep(case)
    assert torch.equal(verdict.source_N == Source.ACCEPTED, kept)
    assert torch.equal(verdict.token_N[kept], case.draft_N[kept])
    assert set(verdict.source_N[~kept].tolist()) <= {Source.RESAMPLED if gate == "ask_again" else Source.REPLACED}


@given(top_k=st.integers(1, 2000), decay_len=st.integers(1, 3000), age=st.integers(0, 4000))
def test_decaying_k(top_k, decay_len, age):
    """From K evenly to 1, and there it stays."""
    ages = torch.tensor([0, age, age + 1, decay_len])
    values = decayed_top_k(torch.full((4,), top_k), ages, torch.full((4,), decay_len)).tolist()
    assert values[0] == top_k and values[3] == 1
    assert values[1] == max(1, math.ceil(top_k * (decay_len - age) / decay_len)) >= values[2]


@given(steps=st.integers(1, 40), unit=st.integers(1, 40), age=st.integers(0, 2000))
def test_decaying_k_is_the_releases_where_its_steps_are_even(steps, unit, age):
    """K - ceil(K / L) floor(t / max(floor(K^-1 L), 1)), for L a multiple of K or K of L."""
    for top_k, decay_len in ((steps, steps * unit), (steps * unit, steps)):
        every, drop = max(decay_len // top_k, 1), max(math.ceil(top_k / decay_len), 1)
        expected = max(1, top_k - drop * (age // every))
        found = decayed_top_k(*(torch.tensor([x]) for x in (top_k, age, decay_len)))
        assert found.item() == expected


def test_k_falls_with_the_response_and_not_with_the_prompt():
    """A row's K is that of its own place, prompt length and settings."""
    falling, fixed = SamplingSettings(8, top_k_decay_len=8), SamplingSettings(5)
    case = replace(
        proposals(1, 0.0).select(torch.arange(4)),
        position_N=torch.tensor([10, 12, 12, 30]),
        prompt_len_N=torch.tensor([10, 10, 6, 10]),
        settings=SettingRows.of([falling, falling, falling, fixed], "cpu"),
    )
    assert case.top_k_N.tolist() == [8, 6, 2, 5]
    assert case.select(torch.tensor([3, 1])).top_k_N.tolist() == [5, 6]


def test_no_decay_is_k_itself_also_at_zero():
    k, age = torch.tensor([25, 0, 2**31 - 1]), torch.tensor([900, 900, 900])
    assert torch.equal(decayed_top_k(k, age, torch.zeros(3, dtype=torch.int64)), k)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    gate=st.sampled_from(sorted(GATES)),
    threshold=st.floats(0, 1),
    top_k=st.integers(0, VOCAB + 2),
)
def test_blocks_of_every_gate(seed, counts, gate, threshold, top_k):
    """A block is a run of kept proposals, at most one other token at its end, and never empty or longer."""
    total = sum(counts)
    generator = torch.Generator().manual_seed(seed)
    one = proposals(seed, threshold, top_k, repeat=-(-total // VOCAB)).select(torch.arange(total))
    draft_N = torch.randint(VOCAB, (total,), generator=generator)
    verdict = judge(GATES[gate], replace(one, draft_N=draft_N))
    counts_B = torch.tensor(counts)
    request_N = torch.arange(len(counts)).repeat_interleave(counts_B)
    place_N = torch.arange(total) - (counts_B.cumsum(0) - counts_B)[request_N]

    def to_block(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(counts), 6).index_put_((request_N, place_N), values)

    blocks = assemble_block(
        to_block(draft_N), to_block(verdict.token_N == draft_N), to_block(verdict.token_N), counts_B
    )
    for row, count in enumerate(counts):
        mine = (request_N == row).nonzero().squeeze(1)
        drafts, tokens = draft_N[mine].tolist(), verdict.token_N[mine].tolist()
        changed = next((i for i in range(count) if drafts[i] != tokens[i]), count - 1)
        assert blocks[row].tolist() == tokens[: changed + 1] + [-1] * (5 - changed)


@pytest.mark.parametrize("gate", GATES)
def test_replacement_without_residual_is_the_warped_teacher(gate):
    case = proposals(3, 0.5, teacher_temperature=0.7, teacher_top_p=0.8)
    if gate not in ("interpolated", "blended"):
        torch.testing.assert_close(GATES[gate].replacement(case), case.teacher_probs_NV)


def test_chance_keeps_at_its_rate():
    kept = GATES["chance"].keep(proposals(5, 0.3, repeat=2000)).double().mean().item()
    assert abs(kept - 0.7) < 5 * math.sqrt(0.21 / (2000 * VOCAB))


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_interpolation_has_exactly_the_mixed_distribution(gamma):
    """q(v) P(keep v) + P(reject) residual(v) = (1 - g) q(v) + g p(v); the coin's bound is exact, so is the sum."""
    case = proposals(6, gamma, student_temperature=0.8, teacher_temperature=0.6)
    p, q = case.teacher_probs_NV[0].double(), case.student_probs_NV[0].double()
    mixture = (1 - gamma) * q + gamma * p
    keep = (mixture / q).clamp_max(1.0)
    residual = GATES["interpolated"].replacement(case)[0].double()
    emitted = q * keep + (1 - (q * keep).sum()) * residual / residual.sum()
    torch.testing.assert_close(emitted, mixture, atol=1e-6, rtol=0)
    rejected = 1 - (q * keep).sum()
    torch.testing.assert_close(rejected, gamma * 0.5 * (p - q).abs().sum(), atol=1e-6, rtol=0)
    many = proposals(6, gamma, student_temperature=0.8, teacher_temperature=0.6, repeat=4000)
    rates = GATES["interpolated"].keep(many).double().view(VOCAB, -1).mean(1)
    torch.testing.assert_close(rates, keep, atol=0.04, rtol=0)


@pytest.mark.parametrize("budget", [0.002, 0.1, 0.6, 50.0])
def test_blend_has_exactly_its_distribution(budget):
    """q(v) P(keep v) + P(reject) residual(v) = m(v), m from the definition in float64."""
    warp = dict(student_temperature=0.8, teacher_temperature=0.6)
    case = proposals(6, budget, **warp)
    p, q = (x[0].double() / x[0].double().sum() for x in (case.teacher_probs_NV, case.student_probs_NV))
    m = torch.tensor(slow_blend(p.tolist(), q.tolist(), budget), dtype=torch.float64)
    torch.testing.assert_close(case.blend_NV[0].double(), m, atol=2e-6, rtol=1e-5)
    keep = (m / q).clamp_max(1.0)
    residual = GATES["blended"].replacement(case)[0].double()
    emitted = q * keep + (1 - (q * keep).sum()) * residual / residual.sum()
    torch.testing.assert_close(emitted, m, atol=2e-6, rtol=0)
    rates = GATES["blended"].keep(proposals(6, budget, repeat=4000, **warp)).double().view(VOCAB, -1).mean(1)
    torch.testing.assert_close(rates, keep, atol=0.04, rtol=0)
    if budget == 50.0:
        torch.testing.assert_close(m, p)


def slow_blend(p: list[float], q: list[float], budget: float) -> list[float]:
    """The largest a on a grid that is made finer where the budget ends; KL added up as it is defined."""

    def at(a: float) -> list[float]:
        weights = [y ** (1 - a) * x**a if x and y else 0.0 for x, y in zip(p, q, strict=True)]
        return [w / sum(weights) for w in weights]

    def cost(a: float) -> float:
        return sum(m * math.log(m / y) for m, y in zip(at(a), q, strict=True) if m)

    if not any(x and y for x, y in zip(p, q, strict=True)):
        return q
    step, a = 1.0, 0.0
    for _ in range(40):
        while a + step <= 1 and cost(a + step) <= budget:
            a += step
        step /= 2
    return at(a) if a else q


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.sampled_from([0.0, 1e-4, 0.05, 1.0, 9.0]), holes=st.booleans())
def test_blend_within_its_budget(seed, budget, holes):
    """For any pair, also where tokens are missing in either: KL(m||q) <= budget, and no larger a would fit."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, 9, generator=generator).mul(2).exp() for _ in range(2))
    if holes:
        p, q = (x * (torch.rand(2, 9, generator=generator) < 0.6) + 1e-30 for x in (p, q))
        p, q = (torch.where(x < 1e-20, 0.0, x) for x in (p, q))
        p[:, 0] += 0.1  # each has some token, and not always one of the other's
        q[:, seed % 9] += 0.1
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    m = geometric_blend(p, q, torch.full((2,), budget)).double()
    for row in range(2):
        expected = slow_blend(p[row].tolist(), q[row].tolist(), budget)
        torch.testing.assert_close(
            m[row], torch.tensor(expected).double(), atol=3e-3 if budget < 1e-3 else 1e-4, rtol=0
        )
    kl = torch.special.xlogy(m, m / q.double()).nan_to_num(0.0).sum(-1)
    assert (kl <= budget + 2e-6).all() and torch.allclose(m.sum(-1), torch.ones(2).double(), atol=1e-5)


def test_interpolation_of_equal_models_always_has_a_replacement():
    case = proposals(7, 0.5)
    same = replace(case, student=case.teacher)
    assert (GATES["interpolated"].replacement(same).sum(-1) > 0).all()
    assert (GATES["blended"].replacement(same).sum(-1) > 0).all() and GATES["blended"].keep(same).all()
