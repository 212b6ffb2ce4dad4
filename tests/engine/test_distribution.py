"""The distribution of the tokens that the real engine emits, from its own ids and slow transformers forwards only."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from scipy import stats

from skd_plugin.core import rng, sampling
from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.engine.sampling_rule import SamplingRule
from tests.conftest import EOS, VOCAB
from tests.rules import make_rule
from tests.unit.test_sampling import slow_warp

pytestmark = pytest.mark.engine

P_VALUE = 1e-4
PROMPTS = [[1, 5, 7], [1, 20, 9, 31, 4], [1, 12, 6]]
SAMPLES = 1000  # of each rule
GATES = [1, 3, 12, VOCAB]
BLOCKS = [1, 4]
BLOCK_TOKENS = 32  # of the engine's KV cache; the fixture sets it


def expected(settings: SamplingSettings, teacher_V: torch.Tensor, student_V: torch.Tensor) -> torch.Tensor:
    """Joint distribution of (token, provenance) [2V]: first the student's accepted tokens, then the replacements."""
    p = torch.from_numpy(slow_warp(teacher_V.numpy(), settings.teacher_temperature, settings.teacher_top_p))
    q = torch.from_numpy(slow_warp(student_V.numpy(), settings.student_temperature, settings.student_top_p))
    inside = torch.zeros(len(p), dtype=torch.float64)
    inside[teacher_V.topk(min(settings.top_k, len(p))).indices] = 1
    return torch.cat([inside * q, (1 - (inside * q).sum()) * p])


def assert_distribution(outcomes: list[int], probs_NC: torch.Tensor) -> None:
    """Chi-square test of independent outcomes that each have their own distribution [N, C].

    For one common distribution it is Pearson's test; in general (observed - expected) has the covariance
    sum of diag(m_i) - m_i m_i^T.
    """
    observed = torch.nn.functional.one_hot(torch.tensor(outcomes), probs_NC.shape[1]).double()
    assert not (observed.bool() & (probs_NC < 1e-12)).any(), "an impossible token was emitted"
    mean_C = probs_NC.sum(0)
    rare = mean_C < 8
    bins = [x[:, ~rare] for x in (observed, probs_NC)]
    observed, probs_NC = (
        torch.cat([b, x[:, rare].sum(1, True)], 1) for b, x in zip(bins, (observed, probs_NC), strict=True)
    )
    difference = (observed - probs_NC).sum(0)
    covariance = probs_NC.sum(0).diag() - probs_NC.T @ probs_NC
    values, vectors = torch.linalg.eigh(covariance)
    free = values > 1e-3
    statistic = ((vectors.T @ difference)[free] ** 2 / values[free]).sum()
    assert (vectors.T @ difference)[~free].abs().max() < 1.0, "tokens differ where the distribution leaves no freedom"
    assert stats.chi2.sf(statistic.item(), int(free.sum())) > P_VALUE


def assert_samples_follow(samples: list, rule: SamplingRule, position: int, reference_logits) -> None:
    """Distribution at a response position (1 is the first), given each sample's own prefix."""
    alive = [sample for sample in samples if len(sample.trace) >= position]
    assert len(alive) > len(samples) / 2
    read = [  # by the teacher and by the student
        tuple(tuple(ids + s.trace.response_ids[: position - 1].tolist()) for ids in (s.teacher_ids, s.prompt_ids))
        for s in alive
    ]
    distinct = list(dict.fromkeys(read))
    rows = [
        [row[-1] for row in reference_logits(name, [list(prefix) for prefix in prefixes])]
        for name, prefixes in zip(("teacher", "student"), zip(*distinct, strict=True), strict=True)
    ]
    table = {
        both: expected(rule.settings, teacher, student) for both, teacher, student in zip(distinct, *rows, strict=True)
    }
    outcomes = [int(s.trace.response_ids[position - 1] + VOCAB * s.trace.source[position - 1]) for s in alive]
    assert_distribution(outcomes, torch.stack([table[both] for both in read]))


def generate_mixed(engine, rules: list[SamplingRule], max_new_tokens: int, seed: int) -> list[list]:
    """`SAMPLES` responses of each rule, all rules interleaved in one batch."""
    count = SAMPLES * len(rules)
    prompts = [PROMPTS[i // len(rules) % len(PROMPTS)] for i in range(count)]
    batch = engine.generate(prompts, [rules[i % len(rules)] for i in range(count)], max_new_tokens, seed=seed)
    return [batch[i :: len(rules)] for i in range(len(rules))]


@pytest.fixture(scope="module")
def gate_samples(engine):
    """`gate_samples(draft_len)`: responses one token longer than a block, by K."""

    @cache
    def get(draft_len: int) -> dict[int, list]:
        rules = [make_rule(top_k=top_k) for top_k in GATES]
        batches = generate_mixed(engine(draft_len), rules, max(2, draft_len + 1), seed=draft_len)
        return dict(zip(GATES, batches, strict=True))

    return get


@pytest.mark.parametrize("top_k", GATES)
@pytest.mark.parametrize(("draft_len", "position"), [(1, 1), (1, 2), (4, 1), (4, 2), (4, 5)])
def test_next_token_has_the_distribution_of_the_gate(gate_samples, reference_logits, draft_len, position, top_k):
    """m_K, at the first token, in a block, and just after a block's boundary."""
    samples = gate_samples(draft_len)[top_k]
    assert_samples_follow(samples, make_rule(top_k=top_k), position, reference_logits)


def test_keep_all_is_the_student(gate_samples, reference_logits):
    """K = V without the formula: plain softmax of the student, and no token from the teacher."""
    samples = [s for s in gate_samples(4)[VOCAB] if s.prompt_ids == PROMPTS[0]]
    assert all((s.trace.source == 0).all() for s in samples)
    q = reference_logits("student", PROMPTS[:1])[0][-1].softmax(-1)
    assert_distribution([int(s.trace.response_ids[0]) for s in samples], q.expand(len(samples), -1))


def test_keep_none_is_the_teacher(engine, reference_logits):
    """K = 0 without the formula: plain softmax of the teacher, and no token from the student."""
    samples = engine(4).generate([PROMPTS[0]] * SAMPLES, make_rule(top_k=0), 1, seed=3)
    assert all((s.trace.source == 1).all() for s in samples)
    p = reference_logits("teacher", PROMPTS[:1])[0][-1].softmax(-1)
    assert_distribution([int(s.trace.response_ids[0]) for s in samples], p.expand(len(samples), -1))


WARPED = {
    "student only": make_rule(top_k=VOCAB, student_temperature=0.6, student_top_p=0.8, teacher_temperature=3.0),
    "teacher only": make_rule(top_k=0, teacher_temperature=2.0, teacher_top_p=0.7, student_temperature=0.1),
    "both": make_rule(top_k=5, student_temperature=1.7, student_top_p=0.9, teacher_temperature=0.7, teacher_top_p=0.6),
    "greedy teacher": make_rule(top_k=2, teacher_temperature=0.0),
}


@pytest.fixture(scope="module")
def warped_samples(engine) -> dict[str, list]:
    batches = generate_mixed(engine(4), list(WARPED.values()), 2, seed=11)
    return dict(zip(WARPED, batches, strict=True))


@pytest.mark.parametrize("name", WARPED)
@pytest.mark.parametrize("position", [1, 2])
def test_each_request_has_its_own_temperatures_and_nuclei(warped_samples, reference_logits, name, position):
    assert_samples_follow(warped_samples[name], WARPED[name], position, reference_logits)


@pytest.mark.parametrize("draft_len", BLOCKS)
def test_greedy_student_is_transformers_greedy(engine, hf_models, draft_len):
    prompts = [[1, a, b] for a in range(3, 31, 3) for b in (4, 17)]
    samples = engine(draft_len).generate(prompts, make_rule(top_k=VOCAB, student_temperature=0.0), 24)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt])
        expected = hf_models["student"].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )
        assert sample.trace.response_ids.tolist() == expected[0, len(prompt) :].tolist()


def test_a_seed_fixes_the_tokens(engine):
    """Whatever else is in the batch, in whatever order, and however long the blocks are."""
    rule, other = make_rule(top_k=3), make_rule(top_k=9, student_temperature=0.5, teacher_top_p=0.9)
    prompts, seeds = [PROMPTS[i % 3] for i in range(24)], [1000 + 7 * i for i in range(24)]

    def responses(samples) -> list[list[int]]:
        return [s.trace.response_ids.tolist() for s in samples]

    together = responses(engine(4).generate(prompts, rule, 12, seeds=seeds))
    assert responses(engine(1).generate(prompts, rule, 12, seeds=seeds)) == together
    alone = [engine(4).generate([prompts[i]], rule, 12, seeds=[seeds[i]])[0] for i in (0, 5, 10)]
    assert responses(alone) == [together[i] for i in (0, 5, 10)]
    mixed = engine(4).generate(
        [*[[1, 8, 9, 10]] * 10, *prompts[::-1]], [other] * 10 + [rule] * 24, 12, seeds=[*range(10), *seeds[::-1]]
    )
    assert responses(mixed[10:])[::-1] == together
    assert responses(engine(4).generate(prompts, rule, 12, seeds=[s + 1 for s in seeds])) != together


def test_nothing_follows_the_end_token(gate_samples):
    samples = [s for top_k in GATES for s in gate_samples(4)[top_k]]
    for sample in samples:
        ids = sample.trace.response_ids.tolist()
        assert EOS not in ids[:-1]
        assert sample.finish == ("stop" if ids[-1] == EOS else "length")
    stops = [s for s in samples if s.finish == "stop"]
    kept = [s for s in stops if len(s.trace) < 4 and (s.trace.source == 0).all()]
    assert len(kept) > 10, "ends that were drafted, with more drafts of the same block after them"
    assert any(s.trace.source[-1] == 1 for s in stops), "ends that the teacher put"


def test_prompt_may_end_in_the_end_token(engine):
    """The forced first output is part of the prompt; it must not stop the response."""
    samples = engine(4).generate([[1, 5, EOS]] * 20, make_rule(top_k=3), 3)
    assert all(len(s.trace) > 0 for s in samples)


@pytest.mark.parametrize("draft_len", BLOCKS)
@pytest.mark.parametrize("max_new_tokens", [1, 4, 5, 6])
def test_length_limit_is_exact(engine, draft_len, max_new_tokens):
    """Less than, equal to and more than a block."""
    samples = engine(draft_len).generate(PROMPTS * 8, make_rule(top_k=VOCAB // 2), max_new_tokens)
    lengths = {finish: {len(s.trace) for s in samples if s.finish == finish} for finish in ("stop", "length")}
    assert lengths["length"] == {max_new_tokens}
    assert max(lengths["stop"], default=0) <= max_new_tokens


def test_prompt_of_one_token_is_refused(engine):
    with pytest.raises(ValueError, match="at least 2"):
        engine(1).generate([[1]], make_rule(top_k=3), 4)


def assert_same_responses(left: list, right: list) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.trace.response_ids.tolist() == b.trace.response_ids.tolist()
        assert a.trace.source.tolist() == b.trace.source.tolist()
        torch.testing.assert_close(a.trace.student_logp, b.trace.student_logp, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("full_blocks", "max_num_seqs"), [(0, 4), (2, 5)], ids=["short", "cached"])
def test_request_with_one_token_to_read_joins_a_running_batch(engine, full_blocks, max_num_seqs):
    """vLLM pads such a request with placeholder drafts; they are not proposals of the student.

    It happens to a prompt of two tokens, and to a cached prompt with one token after its last full block.
    """
    rule, seeds = make_rule(top_k=6), list(range(40))
    prompt = [3 + 7 * i % 29 for i in range(full_blocks * BLOCK_TOKENS + 2)]
    alone = engine(4).generate([prompt] * 40, rule, 9, seeds=seeds)
    crowded = engine(2, max_num_seqs=max_num_seqs).generate([prompt] * 40, rule, 9, seeds=seeds)
    assert_same_responses(crowded, alone)


def test_request_that_waits_a_step_keeps_its_drafts(engine):
    """A step's token budget that does not hold the drafts of every running request."""
    rule, prompts, seeds = make_rule(top_k=6), [[1, 5, 3 + i % 29] for i in range(40)], list(range(40))
    roomy = engine(4).generate(prompts, rule, 9, seeds=seeds)
    tight = engine(2, max_num_seqs=16, max_num_batched_tokens=40).generate(prompts, rule, 9, seeds=seeds)
    assert_same_responses(tight, roomy)


@pytest.mark.parametrize("draft_len", BLOCKS)
def test_each_draw_is_that_of_its_position(engine, reference_logits, draft_len):
    """The student's and the teacher's draw at a position invert their distributions at numbers used nowhere else."""
    rule, seeds = make_rule(top_k=12), list(range(60))
    samples = engine(draft_len).generate([PROMPTS[i % 3] for i in seeds], rule, 8, seeds=seeds)
    sequences = [s.prompt_ids + s.trace.response_ids.tolist() for s in samples]
    rows = {name: reference_logits(name, sequences) for name in ("student", "teacher")}
    same = {"student": [], "teacher": []}
    for index, sample in enumerate(samples):
        start, stop = len(sample.prompt_ids), len(sequences[index])
        positions, seed = torch.arange(start, stop), torch.tensor([seeds[index]]).expand(stop - start)
        emitted, replaced = sample.trace.response_ids, sample.trace.source == 1
        proposed = torch.where(replaced, sample.trace.rejected_ids, emitted)
        draws = {
            name: sampling.draw(rows[name][index][start - 1 : -1].softmax(-1), rng.uniform(seed, positions, stream))
            for name, stream in (("student", rng.STUDENT), ("teacher", rng.TEACHER))
        }
        same["student"] += (draws["student"] == proposed).tolist()
        same["teacher"] += (draws["teacher"] == emitted)[replaced].tolist()
    for name, matches in same.items():
        assert len(matches) > 100
        assert sum(matches) >= len(matches) - 2, f"{name}: more than rounding at a step of the distribution"
