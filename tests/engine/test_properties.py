"""What holds for every batch: requests drawn by hypothesis, in the real engine, with several lengths of block."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skd_plugin.core.draft_length import DraftLength
from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.engine.sampling_rule import SamplingRule
from tests.conftest import EOS, MAX_LEN, VOCAB
from tests.rules import make_rule

pytestmark = pytest.mark.engine

LETTERS = "abcdefghijklmnopqrstuvwxyz +="


class InTurn(DraftLength):
    """In place of the length that measurements choose (skd.rollout.draft_len auto): another one each step."""

    def __init__(self) -> None:
        super().__init__(4)
        self._turns = cycle((3, 1, 4, 2, 2, 4))

    def choose(self, requests: int) -> int:
        return next(self._turns)


def scheduler_of(engine):
    return engine._llm.llm_engine.engine_core.engine_core.scheduler


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    top_k: int
    gate: str
    leg: int  # tokens of a leg of the teacher; 0: none
    limit: int
    seed: int
    reference: str | None  # given texts end where the test wants them to end

    @property
    def rule(self) -> SamplingRule:
        if self.reference is not None:
            return make_rule(top_k=VOCAB, reference_share=1.0)
        return make_rule(top_k=self.top_k, gate=self.gate, hand_over_len=self.leg, hand_overs=2)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Prompts with end tokens at any place, end tokens of responses anywhere in a block, limits that cut a block."""
    prompt = draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=40))
    return Request(
        prompt=prompt,
        top_k=draw(st.sampled_from([1, 2, 5, 31, VOCAB])),
        gate=draw(st.sampled_from(["top_k", "ask_again"])),
        leg=draw(st.sampled_from([0, 0, 1, 3])),
        limit=draw(st.integers(1, MAX_LEN - len(prompt))),
        seed=draw(st.integers(0, 2**31)),
        reference=draw(st.none() | st.text(LETTERS, min_size=1, max_size=12)),
    )


def generate(engine, batch: list[Request]) -> list:
    return engine.generate(
        [r.prompt for r in batch],
        [r.rule for r in batch],
        [r.limit for r in batch],
        seeds=[r.seed for r in batch],
        texts=[r.reference for r in batch],
    )


def check(request: Request, sample) -> None:
    trace, ids = sample.trace, sample.trace.response_ids.tolist()
    assert sample.prompt_ids == request.prompt and 1 <= len(ids) <= request.limit
    assert EOS not in ids[:-1], "something follows the end token"
    assert sample.finish == ("stop" if ids[-1] == EOS else "length")
    assert sample.finish == "stop" or len(ids) == request.limit
    if request.reference is not None:
        expected = [LETTERS.index(char) + 3 for char in request.reference] + [EOS]
        assert ids == expected[: request.limit] and set(trace.source.tolist()) == {Source.REFERENCE}
        return
    others = {Source.RESAMPLED} if request.gate == "ask_again" else set()
    others |= {Source.HANDED} if request.leg > 1 else set()
    assert set(trace.source.tolist()) <= {Source.ACCEPTED, Source.REPLACED} | others
    kept = trace.source == Source.ACCEPTED
    assert (trace.rejected_ids[kept] == NOTHING).all() and (trace.rejected_ids[~kept] != NOTHING).all()
    gated = trace.source != Source.HANDED
    if request.leg:  # after two legs nothing is put to the gate
        gated &= (trace.source == Source.REPLACED).cumsum(0) - (trace.source == Source.REPLACED).long() < 2
    assert ((trace.draft_rank < request.top_k) == kept)[gated].all()
    assert (trace.kl > -1e-5).all() and (trace.teacher_logp <= 0).all() and (trace.student_logp <= 0).all()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=st.lists(requests(), min_size=1, max_size=12))
def test_every_batch(engine, batch):
    """Each response ends once and rightly, and is the same token by token whatever the block length is."""
    by_length = [generate(engine(draft_len), batch) for draft_len in (1, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_of(engine(4)), "_lengths", InTurn())
        by_length.append(generate(engine(4), batch))
    for request, short, *others in zip(batch, *by_length, strict=True):
        for other in (short, *others):
            check(request, other)
            for name in ("response_ids", "source", "rejected_ids"):
                assert getattr(short.trace, name).tolist() == getattr(other.trace, name).tolist(), name


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=st.lists(requests(), min_size=2, max_size=8))
def test_every_batch_is_its_requests_one_at_a_time(engine, batch):
    together = generate(engine(4), batch)
    for request, sample in zip(batch, together, strict=True):
        alone = generate(engine(4), [request])[0]
        assert alone.trace.response_ids.tolist() == sample.trace.response_ids.tolist()
        assert alone.trace.source.tolist() == sample.trace.source.tolist()
