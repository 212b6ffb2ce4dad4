"""What the engine says of each token, recomputed from the returned ids by slow transformers forwards."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest
import torch

from skd_plugin.core.losses import categories
from skd_plugin.core.targets import Targets
from skd_plugin.core.trace import NOTHING, OVERLAP, Trace
from skd_plugin.run_folder import json_line
from tests.conftest import EOS, LOSS_TEMPERATURE, MAX_LEN, VOCAB
from tests.rules import make_rule
from tests.unit.test_trace import KEYS

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
TOP_K = 6
ENTRIES = 8  # the teacher's
OWN = 3  # the student's


@dataclass
class Case:
    """All samples' response tokens in one row [M], with the reference's distributions [M, V]."""

    samples: list
    record: Trace
    teacher_logp: torch.Tensor
    student_logp: torch.Tensor


@pytest.fixture(scope="module", params=[1, 4])
def case(request, engine, reference_logits) -> Case:
    """Ragged prompts, more tokens than one step can read, so that some are read in pieces."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + (13 * i) % 57 for i in range(160)]
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    samples = engine(request.param).generate(prompts, make_rule(top_k=TOP_K), 14, seed=5)
    sequences = [s.prompt_ids + s.trace.response_ids.tolist() for s in samples]
    logp = {
        name: torch.cat(
            [
                row[len(s.prompt_ids) - 1 : -1].log_softmax(-1)
                for row, s in zip(reference_logits(name, sequences), samples, strict=True)
            ]
        )
        for name in ("teacher", "student")
    }
    return Case(samples, Trace.join([s.trace for s in samples]), logp["teacher"], logp["student"])


def gather(logp: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logp.gather(1, ids.long()[:, None]).squeeze(1)


def test_no_token_is_undrafted(case):
    assert set(case.record.source.tolist()) == {0, 1}


def test_accepted_tokens_are_in_the_teachers_top_k(case):
    threshold = case.teacher_logp.topk(TOP_K).values[:, -1]
    kept = case.record.source == 0
    assert kept.sum() > 100
    assert (gather(case.teacher_logp, case.record.response_ids)[kept] >= threshold[kept] - TOLERANCE).all()
    assert (case.record.rejected_ids[kept] == -1).all()


def test_rejected_tokens_are_outside_the_teachers_top_k(case):
    best_outside = case.teacher_logp.topk(TOP_K + 1).values[:, -1]
    replaced = case.record.source == 1
    assert replaced.sum() > 100
    rejected = case.record.rejected_ids[replaced]
    assert (rejected >= 0).all()
    assert (gather(case.teacher_logp[replaced], rejected) <= best_outside[replaced] + TOLERANCE).all()


def test_draft_rank(case):
    """Rank of the proposal, which is the emitted token where it was kept."""
    proposal = torch.where(case.record.source == 0, case.record.response_ids, case.record.rejected_ids)
    own = gather(case.teacher_logp, proposal)[:, None]
    at_least = (case.teacher_logp > own + TOLERANCE).sum(1)
    at_most = (case.teacher_logp > own - TOLERANCE).sum(1) - 1
    assert ((case.record.draft_rank >= at_least) & (case.record.draft_rank <= at_most)).all()
    assert torch.equal(case.record.draft_rank < TOP_K, case.record.source == 0)


def test_numbers_of_both_models(case):
    p, q = case.teacher_logp, case.student_logp
    expected = {
        "student_logp": gather(q, case.record.response_ids),
        "teacher_logp": gather(p, case.record.response_ids),
        "kl": (p.exp() * (p - q)).sum(-1),
        "student_entropy": -(q.exp() * q).sum(-1),
        "teacher_entropy": -(p.exp() * p).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(case.record, name).double(), value, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_agreement_at_the_top(case):
    """Near-equal tokens may swap places: a token or two of all."""
    order = [logp.argsort(descending=True)[:, :OVERLAP].tolist() for logp in (case.teacher_logp, case.student_logp)]
    expected = [len(set(p) & set(q)) / OVERLAP for p, q in zip(*order, strict=True)]
    assert (case.record.top_overlap - torch.tensor(expected)).abs().gt(1e-6).sum() <= 5
    same = torch.tensor([p[0] == q[0] for p, q in zip(*order, strict=True)]).float()
    assert (case.record.same_first != same).sum() <= 2 and 0.02 < same.mean() < 0.98


def test_teacher_entries(case):
    """The same log-probabilities by falling rank; an id may differ only between near-equal ones."""
    best = case.teacher_logp.topk(ENTRIES).values
    torch.testing.assert_close(case.record.teacher_topk_logp[:, :ENTRIES].double(), best, atol=TOLERANCE, rtol=0)
    named = case.teacher_logp.gather(1, case.record.teacher_topk_ids[:, :ENTRIES].long())
    torch.testing.assert_close(named, best, atol=2 * TOLERANCE, rtol=0)
    assert all(len(set(row)) == ENTRIES for row in case.record.teacher_topk_ids[:, :ENTRIES].tolist())


def test_students_entries(case):
    """Its first tokens that are not among the teacher's, with the teacher's opinion of them."""
    ids, logp = case.record.teacher_topk_ids[:, ENTRIES:].long(), case.record.teacher_topk_logp[:, ENTRIES:].double()
    theirs, first = case.record.teacher_topk_ids[:, :ENTRIES].tolist(), case.student_logp.topk(OWN).indices.tolist()
    expected = [[v if v not in row else NOTHING for v in own] for own, row in zip(first, theirs, strict=True)]
    assert ids.shape[1] == OWN and (ids != torch.tensor(expected)).any(1).sum() <= 3  # near-equal ones swap places
    named = ids != NOTHING
    assert 50 < named.sum() < named.numel() - 50
    found = case.teacher_logp.gather(1, ids.clamp_min(0))
    torch.testing.assert_close(logp[named], found[named], atol=TOLERANCE, rtol=0)
    assert (logp[~named] == -torch.inf).all()


def test_rest_beside_the_entries_and_the_emitted_token(case):
    """Its sum at the loss's temperature, by a loop over the tokens; many emitted tokens are among the entries."""
    softened = (case.teacher_logp / LOSS_TEMPERATURE).exp()
    named = torch.cat([case.record.teacher_topk_ids, case.record.response_ids[:, None]], 1).tolist()
    rest = [sum(row[v].item() for v in range(VOCAB) if v not in own) for row, own in zip(softened, named, strict=True)]
    expected = torch.tensor(rest, dtype=torch.float64).log()
    torch.testing.assert_close(case.record.teacher_rest_tempered.double(), expected, atol=TOLERANCE, rtol=0)
    outside = sum(own[-1] not in own[:-1] for own in named)
    assert 50 < outside < len(named) - 50


def test_loss_of_the_record_is_the_loss_of_the_models(case):
    """Categories made of the record against those of the teacher's logits, at the loss's temperature."""
    targets = Targets.of(case.record, torch.device("cpu"))
    log_p, log_q = categories(case.student_logp, targets, LOSS_TEMPERATURE)
    for found, logp in ((log_p, case.teacher_logp), (log_q, case.student_logp)):
        soft = (logp / LOSS_TEMPERATURE).softmax(-1)
        named = (
            torch.zeros_like(soft)
            .scatter(1, targets.teacher_ids_NK.where(targets.teacher_ids_NK != NOTHING, targets.token_N[:, None]), 1.0)
            .scatter(1, targets.token_N[:, None], 1.0)
        )
        torch.testing.assert_close(found[:, -1].exp(), (soft * (1 - named)).sum(-1), atol=TOLERANCE, rtol=0)
        own = found[:, -2].exp()
        expected = gather(soft, case.record.response_ids) * (own > 0)
        torch.testing.assert_close(own, expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found), dtype=torch.float64))


def test_json_lines(case):
    for sample in case.samples:
        line = json.loads(json_line(sample.trace.to_json(sample.prompt_ids, sample.finish)))
        assert set(line) == KEYS
        assert line["prompt_ids"] == sample.prompt_ids and line["finish"] == sample.finish
        length = len(line["response_ids"])
        assert length == 14 or line["response_ids"][-1] == EOS
        assert {len(line[key]) for key in KEYS - {"prompt_ids", "finish"}} == {length}
        assert line["source"][0] in "st" and "u" not in line["source"]
        assert {len(row) for row in line["teacher_topk_ids"]} <= set(range(ENTRIES, ENTRIES + OWN + 1))
        assert [*map(len, line["teacher_topk_ids"])] == [*map(len, line["teacher_topk_logp"])]
        assert all(NOTHING not in row for row in line["teacher_topk_ids"])


def test_text_is_the_decoded_response(case):
    alphabet = "abcdefghijklmnopqrstuvwxyz +="
    for sample in case.samples:
        ids = sample.trace.response_ids.tolist()
        assert sample.text == "".join(alphabet[token - 3] for token in ids if token >= 3)


@pytest.mark.parametrize("draft_len", [1, 4])
def test_the_longest_sequence_is_drafted_to_its_end(engine, draft_len):
    """A full max_len: no token near the engine's limit comes without a proposal."""
    prompts = [[1, *range(3, 30), 3 + i] for i in range(16)]
    samples = engine(draft_len).generate(prompts, make_rule(top_k=TOP_K), MAX_LEN - len(prompts[0]), seed=9)
    assert any(s.finish == "length" for s in samples)
    for sample in samples:
        assert (sample.trace.source != 2).all()
        assert sample.finish == "stop" or len(sample.trace) == MAX_LEN - len(sample.prompt_ids)


def test_new_weights_are_the_ones_that_draft(engine, hf_models):
    """Weights loaded into the running engine change what it drafts: nothing that was packed away survives."""
    own_engine, prompt = engine(1), [1, 5, 7, 9]
    student = hf_models["student"]
    changed = {name: weight * 1.5 for name, weight in student.named_parameters()}
    rule = make_rule(top_k=VOCAB)
    try:
        own_engine.load_student([(name, weight.detach()) for name, weight in changed.items()])
        sample = own_engine.generate([prompt], rule, 6, seed=4)[0]
    finally:
        own_engine.load_student([(name, weight.detach()) for name, weight in student.named_parameters()])
    ids = sample.trace.response_ids.long()
    logits = torch.func.functional_call(student, changed, (torch.tensor([[*prompt, *ids.tolist()]]),)).logits[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(sample.trace.student_logp, expected.detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("draft_len", [1, 4])
def test_teachers_hidden_states(engine, hf_models, draft_len):
    """Times the teacher's output head they are the distributions that the trace tells of, at every token."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (2 + (7 * i) % 40,), generator=generator).tolist() for i in range(48)]
    own_engine = engine(draft_len, teacher_hidden=True)
    traces = [s.trace for s in own_engine.generate(prompts, make_rule(top_k=TOP_K), 14, seed=6)]
    record, head = Trace.join(traces), hf_models["teacher"].lm_head.weight.detach()
    assert {len(trace.teacher_hidden) == len(trace) for trace in traces} == {True}
    assert record.teacher_hidden.shape == (len(record), head.shape[1]) and record.teacher_hidden.dtype == head.dtype
    logp = (record.teacher_hidden @ head.T).log_softmax(-1)
    torch.testing.assert_close(gather(logp, record.response_ids), record.teacher_logp, atol=1e-4, rtol=0)
    named = logp.gather(1, record.teacher_topk_ids[:, :ENTRIES].long())
    torch.testing.assert_close(named, record.teacher_topk_logp[:, :ENTRIES], atol=1e-4, rtol=0)
    assert "teacher_hidden" not in traces[0].to_json(prompts[0], "stop")


def test_hidden_states_are_not_kept_unasked(case):
    assert case.record.teacher_hidden.shape == (len(case.record), 0)


def test_seconds_of_the_engine_are_told_by_part_and_once(case, engine):
    """The parts lie within the time that the engine worked."""
    one = engine(1)
    one.take_seconds()
    started = time.perf_counter()
    one.generate([[3, 4, 5]] * 4, make_rule(top_k=TOP_K), 6, seed=1)
    worked_s = time.perf_counter() - started
    seconds = one.take_seconds()
    assert set(seconds) == {"schedule", "verify", "sample", "record", "draft", "traces"}
    assert all(value > 0 for value in seconds.values()) and sum(seconds.values()) <= worked_s
    assert not any(one.take_seconds().values())
