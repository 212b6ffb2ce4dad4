"""What a worker keeps of the requests in flight, and when it lets go of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skd_plugin.engine.request_table import RequestTable
from tests.requests import make_request
from tests.rules import make_rule
from tests.traces import trace_of

REFERENCE = make_rule(top_k=5, reference_share=1.0)


class Worker:
    """A table, and vLLM's own of the same requests."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.table = RequestTable(self.states, torch.device("cpu"), teacher_top_k=2, vocab_size=9)

    def add(self, request_id: str, prompt_ids: list[int], **request: Any) -> None:
        params = make_request(prompt_ids, **request).sampling_params
        self.states[request_id] = SimpleNamespace(sampling_params=params)

    def end(self, request_id: str) -> None:
        del self.states[request_id]
        self.table.forget([request_id])


@pytest.fixture
def worker() -> Worker:
    worker = Worker()
    worker.add("a", [4, 5, 6], rule=make_rule(top_k=3), seed=7, trace_id=1)
    worker.add("b", [4, 8], rule=REFERENCE, reference="xyz", seed=-8, trace_id=2)
    return worker


def test_rows_are_those_of_the_batch(worker: Worker) -> None:
    rows = worker.table.rows(["b", "a"])
    assert rows.seed_B.tolist() == [-8, 7] and rows.prompt_len_B.tolist() == [2, 3]
    assert rows.is_forced_B.tolist() == [True, False] and rows.settings.top_k.tolist() == [5, 3]
    assert rows.forced_BF.tolist() == [[*map(ord, "xyz"), 2], [-1] * 4]
    assert [params.first_token for params in rows.params] == [8, 6]
    assert worker.table.rows(["b", "a"]) is rows and worker.table.rows(["a"]).seed_B.tolist() == [7]


def test_an_id_that_comes_again_is_another_request(worker: Worker) -> None:
    worker.table.rows(["a"])
    worker.end("a")
    worker.add("a", [4, 5], seed=3)
    assert worker.table.rows(["a"]).seed_B.tolist() == [3]


def test_a_request_of_another_maker_is_refused(worker: Worker) -> None:
    worker.states["c"] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None))
    with pytest.raises(KeyError, match="only requests that come through skd_plugin"):
        worker.table.rows(["a", "c"])


def test_proposals_wait_for_their_step(worker: Worker) -> None:
    """Of two requests with two drafts each, one is verified a step later, and then in part."""
    logp_BLV = torch.randn(2, 2, 9)
    worker.table.keep_proposals(["a", "b"], logp_BLV)
    assert torch.equal(worker.table.take_proposals(["a", "b"], [0, 2]), logp_BLV[1])
    worker.table.keep_proposals(["b"], torch.randn(1, 2, 9))
    assert torch.equal(worker.table.take_proposals(["a"], [1]), logp_BLV[0, :1])
    with pytest.raises(RuntimeError, match="did not propose, for request a: the engine's max_model_len is too small"):
        worker.table.take_proposals(["a"], [1])


def test_an_ended_request_leaves_its_trace_alone(worker: Worker) -> None:
    worker.table.rows(["a", "b"])
    worker.table.keep_proposals(["a"], torch.randn(1, 2, 9))
    worker.table.record([1, 2], [2, 0], trace_of(torch.tensor([4, 5])))
    worker.table.record([1, 2], [1, 1], trace_of(torch.tensor([6, 7])))
    for request_id in ("a", "b", "a"):
        worker.table.forget([request_id])
    assert not worker.table._in_flight
    first, second, unknown = worker.table.take([1, 2, 3])
    assert (first.response_ids.tolist(), second.response_ids.tolist(), len(unknown)) == ([4, 5, 6], [7], 0)
    assert unknown.teacher_topk_ids.shape == (0, 2)
    assert [len(trace) for trace in worker.table.take([1, 2])] == [0, 0]


def test_a_request_that_goes_on_after_a_preemption_repeats_its_last_token(worker: Worker) -> None:
    """On every rank of an engine, also on those that keep no traces."""
    worker.table.note_emitted(["a", "b"], [[4, 5], []])
    worker.table.note_emitted(["a", "b"], [[6], [7]])
    assert (worker.table.last_token("a", 2), worker.table.last_token("b", 0)) == (6, 7)
    worker.table.take([1, 2])
    assert worker.table.last_token("a", 3) == 0
    with pytest.raises(RuntimeError, match="vLLM asked for token 3 of a response without drafts for it"):
        worker.table.take([1])


def test_tokens_after_the_last_look_go_nowhere(worker: Worker) -> None:
    """A request that was cut off, by a stop string or by who asked for it, may go on for a step."""
    worker.table.rows(["a", "b"])
    both = trace_of(torch.tensor([7, 8], dtype=torch.int32))
    worker.table.record([1, 2], [1, 1], both)
    assert [len(trace) for trace in worker.table.take([1])] == [1]
    worker.table.record([1, 2], [1, 1], both)
    worker.end("a")
    assert [trace.response_ids.tolist() for trace in worker.table.take([1, 2])] == [[], [8, 8]]
    worker.end("b")
    assert not worker.table._parts and not worker.table._fetched
