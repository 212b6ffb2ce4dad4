"""Given texts through the real engine: their tokens exactly, and what both models say of them."""

from __future__ import annotations

import pytest
import torch

from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.engine.references import MissingReference, is_chosen
from tests.conftest import EOS, MAX_LEN, VOCAB
from tests.rules import make_rule

pytestmark = pytest.mark.engine

SUPERVISED = make_rule(top_k=VOCAB, reference_share=1.0)
LETTERS = "abcdefghijklmnopqrstuvwxyz +="
TOLERANCE = 1e-3


def texts_of(count: int, longest: int) -> list[str]:
    generator = torch.Generator().manual_seed(7)
    lengths = [1 + (5 * i) % longest for i in range(count)]
    return ["".join(LETTERS[i] for i in torch.randint(len(LETTERS), (n,), generator=generator)) for n in lengths]


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(char) + 3 for char in text] + [EOS]


PROMPTS = [[1, 5 + i % 20, *range(3, 4 + i % 9)] for i in range(40)]
TEXTS = texts_of(40, 23)


def assert_forced(samples: list, texts: list[str], reference_logits, limit: int = MAX_LEN) -> None:
    """The texts token by token, and the log-probabilities of plain forwards of both models."""
    sequences = [s.prompt_ids + s.trace.response_ids.tolist() for s in samples]
    logp = {name: [x.log_softmax(-1) for x in reference_logits(name, sequences)] for name in ("teacher", "student")}
    for index, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        expected, trace = ids_of(text), sample.trace
        assert trace.response_ids.tolist() == expected[:limit]
        assert sample.finish == ("stop" if len(expected) <= limit else "length")
        assert (trace.source == Source.REFERENCE).all() and (trace.rejected_ids == NOTHING).all()
        drafted = trace.draft_rank != NOTHING
        assert torch.equal(drafted, ~trace.student_logp.isnan())
        rows = {name: logp[name][index][len(sample.prompt_ids) - 1 : -1] for name in logp}
        own = trace.response_ids.long()[:, None]
        for name in ("teacher", "student"):
            known = drafted if name == "student" else torch.ones_like(drafted)
            found = getattr(trace, f"{name}_logp").double()[known]
            torch.testing.assert_close(found, rows[name].gather(1, own).squeeze(1)[known], atol=TOLERANCE, rtol=0)
        best = rows["teacher"].topk(8).values
        torch.testing.assert_close(trace.teacher_topk_logp[:, :8].double(), best, atol=TOLERANCE, rtol=0)
        kl = (rows["teacher"].exp() * (rows["teacher"] - rows["student"])).sum(-1)
        torch.testing.assert_close(trace.kl.double()[drafted], kl[drafted], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("draft_len", [1, 4])
def test_references_come_out_as_they_went_in(engine, reference_logits, draft_len):
    samples = engine(draft_len).generate(PROMPTS, SUPERVISED, 40, texts=TEXTS)
    assert_forced(samples, TEXTS, reference_logits)
    assert all((s.trace.draft_rank >= 0).all() for s in samples)


def test_a_long_reference_is_cut_like_any_response(engine, reference_logits):
    """At max_new_tokens, without an end token; the one that just fits has its own."""
    samples = engine(4).generate(PROMPTS, SUPERVISED, 11, texts=TEXTS)
    assert {len(s.trace) for s in samples} >= {11} and any(len(ids_of(t)) == 11 for t in TEXTS)
    assert_forced(samples, TEXTS, reference_logits, limit=11)


def test_mixture_is_made_of_both(engine):
    """Sampled responses are those of a run without references; which prompts are sampled is the rule's choice."""
    mixed = make_rule(top_k=4, reference_share=0.5)
    seeds = list(range(40))
    plain = engine(4).generate(PROMPTS, make_rule(top_k=4), 12, seeds=seeds)
    both = engine(4).generate(PROMPTS, mixed, 12, seed=6, seeds=seeds, texts=TEXTS)
    for prompt, text, sampled, sample in zip(PROMPTS, TEXTS, plain, both, strict=True):
        if is_chosen(0.5, 6, prompt):
            assert sample.trace.response_ids.tolist() == ids_of(text)[:12]
            assert (sample.trace.source == Source.REFERENCE).all()
        else:
            assert sample.trace.response_ids.tolist() == sampled.trace.response_ids.tolist()
            assert (sample.trace.source != Source.REFERENCE).all()
    assert 10 < sum(is_chosen(0.5, 6, prompt) for prompt in PROMPTS) < 30


def test_missing_reference_names_the_prompt(engine):
    with pytest.raises(MissingReference, match="this one has none: '<s>cab'"):
        engine(4).generate([[1, 5, 3, 4]], SUPERVISED, 12, texts=[None])


def test_evaluation_needs_no_reference(engine):
    samples = engine(4).generate(PROMPTS[:3], SUPERVISED.student_only(0.0), 6)
    assert all((s.trace.source == 0).all() for s in samples)
