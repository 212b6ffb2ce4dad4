"""A pair that ends its turns with two tokens: the law of the tokens and the traces, with the two added up by hand."""

from __future__ import annotations

import pytest
import torch

from skd_plugin.check import self_test_process
from skd_plugin.core.trace import Source
from tests.conftest import EOS, TEACHERS_END, VOCAB
from tests.engine.test_distribution import PROMPTS, assert_samples_follow, generate_mixed
from tests.rules import make_rule
from tests.specs import make_spec

pytestmark = pytest.mark.engine

RULES = {
    "K = 1": make_rule(top_k=1),
    "K = 4": make_rule(top_k=4),
    "the student": make_rule(top_k=VOCAB, student_temperature=1.4, student_top_p=0.9),
    "the teacher": make_rule(top_k=0, teacher_temperature=1.4),
}


@pytest.fixture(scope="module")
def two_ended(engine, two_ends):
    return engine(4, two_ends)


@pytest.fixture(scope="module")
def joined_logits(reference_logits):
    """`reference_logits` with the probability of the teacher's end token given to the student's."""

    def joined(name: str, sequences) -> list[torch.Tensor]:
        found = []
        for logits_TV in reference_logits(name, sequences):
            probs_TV = logits_TV.softmax(-1)
            probs_TV[:, EOS] += probs_TV[:, TEACHERS_END]
            probs_TV[:, TEACHERS_END] = 1e-300  # never, but a number
            found.append(probs_TV.log())
        return found

    return joined


@pytest.fixture(scope="module")
def samples(two_ended) -> dict[str, list]:
    return dict(zip(RULES, generate_mixed(two_ended, list(RULES.values()), 6, seed=5), strict=True))


@pytest.mark.parametrize("position", [1, 2, 5])
@pytest.mark.parametrize("name", RULES)
def test_law(samples, joined_logits, name: str, position: int) -> None:
    """A proposed end is kept where the ends together are among the first K, and both models draw from the joined."""
    alive = [s for s in samples[name] if len(s.trace) >= position]
    if len(alive) <= len(samples[name]) / 2:
        pytest.skip("too few responses are that long")
    assert_samples_follow(samples[name], RULES[name], position, joined_logits)


def test_any_end_ends_the_response_and_is_written_as_the_students(samples, two_ended) -> None:
    ends = []
    for sample in [s for own in samples.values() for s in own]:
        ids = sample.trace.response_ids.tolist()
        assert TEACHERS_END not in ids and EOS not in ids[:-1]
        assert sample.finish == ("stop" if ids[-1] == EOS else "length")
        if ids[-1] == EOS:
            ends.append(int(sample.trace.source[-1]))
            assert two_ended.decode(ids) == two_ended.decode(ids[:-1])
    assert {Source.ACCEPTED, Source.REPLACED} <= set(ends)


def test_the_ends_mattered(samples, reference_logits) -> None:
    """Else the tests above would pass without joining: apart, both tokens have much of both models' mass."""
    prefixes = [s.prompt_ids + s.trace.response_ids[:-1].tolist() for s in samples["K = 4"]]
    for name in ("teacher", "student"):
        mass_N = torch.stack([row[-1].softmax(-1)[TEACHERS_END] for row in reference_logits(name, prefixes)])
        assert mass_N.mean() > 0.01


def test_traces_say_what_the_joined_distributions_are(samples, joined_logits) -> None:
    chosen = [s for own in samples.values() for s in own[:40]]
    sequences = [s.prompt_ids + s.trace.response_ids.tolist() for s in chosen]
    rows = [joined_logits(name, sequences) for name in ("teacher", "student")]
    for sample, theirs, own in zip(chosen, *rows, strict=True):
        trace, start = sample.trace, len(sample.prompt_ids) - 1
        log_p, log_q = theirs[start:-1].log_softmax(-1), own[start:-1].log_softmax(-1)
        ids = trace.response_ids.long()[:, None]
        rank = (log_p > log_p.gather(1, ids)).sum(-1)
        entropies = [-(x.exp() * x).sum(-1) for x in (log_p, log_q)]
        top = log_p.topk(8, dim=-1).values
        figures = {
            "teacher_logp": log_p.gather(1, ids).squeeze(1),
            "student_logp": log_q.gather(1, ids).squeeze(1),
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "teacher_entropy": entropies[0],
            "student_entropy": entropies[1],
        }
        for name, wanted in figures.items():
            torch.testing.assert_close(getattr(trace, name).double(), wanted, atol=1e-4, rtol=1e-4, msg=name)
        torch.testing.assert_close(trace.teacher_topk_logp[:, :8].double(), top, atol=1e-4, rtol=1e-4)
        kept = trace.source == Source.ACCEPTED
        assert torch.equal(trace.draft_rank[kept].long(), rank[kept])


def test_a_reference_with_the_teachers_end(two_ended) -> None:
    """Its own end, wherever the text has it, ends the response as the student's would; log q of it is a number."""
    rule = make_rule(top_k=VOCAB, reference_share=1.0)
    found = two_ended.generate(PROMPTS[:2], rule, 8, texts=["abeab", "abc"])
    assert [s.trace.response_ids.tolist() for s in found] == [[3, 4, EOS], [3, 4, 5, EOS]]
    assert all(s.finish == "stop" and (s.trace.student_logp > -50).all() for s in found)


def test_transformers_reads_the_pair_as_the_engine_does(two_ended, two_ends) -> None:
    """What `skd check` compares before a run."""
    models = {role: str(two_ends / role) for role in ("teacher", "student")}
    trial = self_test_process.Trial(make_spec(**models, joins_ends=True), PROMPTS, max_new_tokens=12)
    drawn = self_test_process.sample(two_ended, trial)
    assert any(trace.response_ids[-1] == EOS for trace in drawn.traces), "or the ends are not in it"
    measured = self_test_process.compare(trial, drawn, "float32")
    assert measured.max_teacher_gap < 1e-4 and measured.max_draft_gap < 1e-4


def test_an_engine_says_what_it_joins(engine, two_ended) -> None:
    assert two_ended.description["end_ids"] == [EOS, TEACHERS_END]
    assert engine(4).description["end_ids"] == []
