"""What a teacher elsewhere says of a text, as a trace of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from skd_plugin.core.reading import RESOLUTION, Reading
from skd_plugin.core.trace import NOTHING, Trace
from skd_plugin.served.replicas import ServerError
from skd_plugin.served.teacher import prompt_logprobs, reading_of
from tests.traces import trace_of

P = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04]], dtype=torch.float64)


def students(tokens: list[int], own_first: list[list[int]]) -> Trace:
    """A student's trace of these tokens, with its own most probable ones at each."""
    return trace_of(torch.tensor(tokens), teacher_topk_ids=torch.tensor(own_first, dtype=torch.int32))


def said(probs: list[float], token: int, top_k: int) -> dict[str, dict[str, float]]:
    """As vLLM says it: the text's token first, then the K most probable ones, by rank."""
    order = sorted(range(len(probs)), key=lambda other: -probs[other])
    entries = {str(t): {"logprob": math.log(probs[t]), "rank": order.index(t) + 1} for t in (token, *order[:top_k])}
    return entries


@pytest.mark.parametrize("token", [1, 4])
def test_rest_is_the_mass_that_nothing_named_has(token: int) -> None:
    probs = P[0].tolist()
    reading = reading_of([said(probs, token, 3)], [token], 3, 6)
    trace = reading.on(students([token], own_first=[[1, 0, 5]]))
    assert trace.teacher_topk_ids.tolist() == [[0, 1, 2]]
    assert trace.draft_rank.tolist() == [token]
    assert trace.teacher_logp.item() == pytest.approx(math.log(probs[token]))
    named = sum(probs[:3]) + (probs[token] if token > 2 else 0.0)
    assert trace.teacher_rest_tempered.item() == pytest.approx(math.log(1 - named), rel=1e-6)
    assert trace.top_overlap.item() == pytest.approx(2 / 3)
    assert trace.same_first.item() == 0.0
    assert trace.kl.isnan().all() and trace.teacher_entropy.isnan().all()


def test_a_rest_below_what_float32_resolves_is_not_less_than_that() -> None:
    probs = [1 - 1e-9, 1e-9]
    trace = reading_of([said(probs, 0, 1)], [0], 1, 2).on(students([0], own_first=[[0]]))
    assert trace.teacher_rest_tempered.item() == pytest.approx(math.log(RESOLUTION))
    more_than_one = Reading(
        torch.tensor([1e-7]).double(), torch.tensor([0]).int(), torch.tensor([[0]]).int(), torch.tensor([[1e-7]])
    )
    assert more_than_one.on(students([0], own_first=[[0]])).teacher_rest_tempered.isfinite().all()


def test_tokens_that_only_the_teacher_has_are_in_the_rest() -> None:
    probs = P[0].tolist()
    trace = reading_of([said(probs, 1, 3)], [1], 3, vocab_size=2).on(students([1], own_first=[[1, 0]]))
    assert trace.teacher_topk_ids.tolist() == [[0, 1, NOTHING]]
    assert trace.teacher_topk_logp[0, 2] == -torch.inf
    assert trace.teacher_rest_tempered.exp().item() == pytest.approx(0.3)


def test_overlap_is_unknown_where_fewer_are_said_than_compared() -> None:
    trace = reading_of([said(P[0].tolist(), 0, 1)], [0], 1, 6).on(students([0], own_first=[[0, 1, 2]]))
    assert trace.top_overlap.isnan().all()
    assert trace.same_first.tolist() == [1.0]


def test_a_probability_of_zero() -> None:
    entries = {"0": {"logprob": 0.0, "rank": 1}, "1": {"logprob": -9999.0, "rank": 2}}
    reading = reading_of([entries], [1], 2, 2)
    assert reading.token_logp_R.tolist() == [-math.inf]


def test_an_empty_response() -> None:
    reading = reading_of([], [], 3, 6)
    assert reading.topk_ids_RK.shape == (0, 3)


@pytest.mark.parametrize(
    "entries",
    [
        {"0": {"logprob": -0.1, "rank": 1}},
        {"0": {"logprob": -0.1, "rank": 1}, "2": {"logprob": -3.0, "rank": 2}},
        {"0": {"logprob": -0.1}, "1": {"logprob": -3.0}, "2": {"logprob": -4.0}},
    ],
    ids=["fewer than K", "not the text's own", "no ranks"],
)
def test_what_is_missing_is_no_reading(entries: dict) -> None:
    with pytest.raises(ServerError, match="asked for the 2 most probable"):
        reading_of([entries], [0] if len(entries) == 1 else [1], 2, 6)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"prompt_logprobs": None}]}])
def test_an_answer_without_log_probs(answer: dict) -> None:
    with pytest.raises(ServerError, match="no prompt_logprobs"):
        prompt_logprobs(answer, 3)


def test_an_answer_about_another_text() -> None:
    with pytest.raises(ServerError, match="sent 3 tokens, and has read 2"):
        prompt_logprobs({"choices": [{"prompt_logprobs": [None, {}]}]}, 3)


def test_what_is_not_the_teachers_stays() -> None:
    trace = students([0, 1], own_first=[[0, 1], [1, 0]])
    trace = replace(trace, student_logp=torch.tensor([-1.0, -2.0]))
    read = reading_of([said(P[0].tolist(), t, 2) for t in (0, 1)], [0, 1], 2, 6).on(trace)
    for name in ("response_ids", "source", "rejected_ids", "student_logp", "student_entropy", "student_version"):
        assert torch.equal(getattr(read, name), getattr(trace, name))
