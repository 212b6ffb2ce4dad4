"""What a worker keeps of the requests in flight, and when it lets go of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skd_plugin.core.copies import Arriving
from skd_plugin.core.gates import GATES
from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.core.verify import Group
from skd_plugin.engine.recorder import _FIGURES, Part
from skd_plugin.engine.request_table import RequestTable
from tests.requests import make_request
from tests.rules import make_rule

TOP_K = 2
REFERENCE = make_rule(top_k=5, reference_share=1.0)


class Worker:
    """A table, and vLLM's own of the same requests."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.table = RequestTable(self.states, torch.device("cpu"), teacher_top_k=TOP_K, vocab_size=9)

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


def part_of(ids: list[int], **figures: float) -> Part:
    """A step that has emitted these tokens, all kept; every figure is 0 where it isn't given."""
    known = torch.tensor([[token, Source.ACCEPTED, NOTHING, 0, 0] for token in ids], dtype=torch.int32)
    numbers = torch.zeros(len(ids), len(_FIGURES) + 2 * TOP_K)
    for name, value in figures.items():
        numbers[:, _FIGURES.index(name)] = value
    return Part(known, Arriving(numbers.view(torch.int32)), None)


def test_rows_are_those_of_the_batch(worker: Worker) -> None:
    rows = worker.table.rows(["b", "a"])
    assert rows.seed_B.tolist() == [-8, 7] and rows.prompt_len_B.tolist() == [2, 3]
    assert rows.settings.top_k.tolist() == [5, 3] and rows.row_of == {2: 0, 1: 1}
    assert rows.forced_BF.tolist() == [[*map(ord, "xyz"), 2], [-1] * 4]
    assert [params.first_token for params in rows.params] == [8, 6]
    assert worker.table.rows(["b", "a"]) is rows
    alone = worker.table.rows(["a"])
    assert alone.seed_B.tolist() == [7] and alone.forced_BF is None


def test_each_proposal_has_the_gate_of_its_request(worker: Worker) -> None:
    """A reference's token has none."""
    worker.add("c", [4, 5], rule=make_rule(top_k=0, gate="floor"), trace_id=3)
    request_N = torch.tensor([0, 0, 1, 2, 2])
    groups = worker.table.rows(["c", "a", "b"]).groups(request_N)
    assert [group.gate for group in groups] == [GATES["floor"], GATES["top_k"], None]
    assert [group.rows.tolist() for group in groups] == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert worker.table.rows(["a"]).groups(torch.tensor([0, 0])) == [Group(GATES["top_k"], None)]


def test_an_id_that_comes_again_is_another_request(worker: Worker) -> None:
    worker.table.rows(["a"])
    worker.end("a")
    worker.add("a", [4, 5], seed=3)
    assert worker.table.rows(["a"]).seed_B.tolist() == [3]


def test_a_request_of_another_maker_is_refused(worker: Worker) -> None:
    worker.states["c"] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None))
    with pytest.raises(KeyError, match="only requests that come through skd_plugin"):
        worker.table.rows(["a", "c"])


def test_placeholders_are_no_drafts(worker: Worker) -> None:
    worker.table.schedule({"a": [-1, -1], "b": [5, 6]})
    keep(worker, ["a", "b"], 2)
    now = worker.table.scheduled(["c", "b", "a"])
    assert now.counts == [0, 2, 0] and worker.table.scheduled(["c", "b", "a"]) is now
    assert worker.table.scheduled(["b"]).counts == [2]
    worker.table.schedule({})
    assert worker.table.scheduled(["b"]).counts == [0]


def keep(worker: Worker, request_ids: list[str], draft_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits_LBV = torch.randn(draft_len, len(request_ids), 9)
    token_BL = torch.randint(9, (len(request_ids), draft_len))
    worker.table.keep_proposals(request_ids, logits_LBV, token_BL)
    return logits_LBV, token_BL


def taken(worker: Worker, request_ids: list[str], counts: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The student's logits at each proposal, and the proposals."""
    worker.table.schedule({name: [0] * count for name, count in zip(request_ids, counts, strict=True)})
    now = worker.table.scheduled(request_ids)
    tokens = worker.table.drafts(now)
    logits, rows = worker.table.take_proposals(now)
    return logits[rows], tokens.tolist()


def test_places_of_drafts(worker: Worker) -> None:
    keep(worker, ["a", "b", "c"], 3)
    worker.table.schedule({"a": [0, 0], "c": [0, 0, 0]})
    now = worker.table.scheduled(["a", "b", "c"])
    assert now.request_N.tolist() == [0, 0, 2, 2, 2] and now.place_N.tolist() == [0, 1, 0, 1, 2]
    assert now.counts_B.tolist() == now.counts == [2, 0, 3] and now.request_ids == ["a", "b", "c"]


def test_proposals_wait_for_their_step(worker: Worker) -> None:
    """Of two requests with three drafts each, one is verified a step later, and then in part, between newer ones of
    which each has two.
    """
    first_LBV, first_BL = keep(worker, ["a", "b"], 3)
    logits, tokens = taken(worker, ["a", "b"], [0, 3])
    assert torch.equal(logits, first_LBV[:, 1]) and tokens == first_BL[1].tolist()
    second_LBV, second_BL = keep(worker, ["c", "b"], 2)
    logits, tokens = taken(worker, ["b", "a", "c"], [2, 1, 2])
    assert torch.equal(logits, torch.cat([second_LBV[:, 1], first_LBV[:1, 0], second_LBV[:, 0]]))
    assert tokens == [*second_BL[1].tolist(), first_BL[0, 0].item(), *second_BL[0].tolist()]
    with pytest.raises(RuntimeError, match="did not propose, for request a: the engine's max_model_len is too small"):
        taken(worker, ["a"], [1])


def test_proposals_of_an_ended_request_do_not_wait(worker: Worker) -> None:
    worker.table.rows(["a"])
    keep(worker, ["a"], 2)
    worker.end("a")
    assert not worker.table._waiting


def test_an_ended_request_leaves_its_trace_alone(worker: Worker) -> None:
    table = worker.table
    table.record(table.rows(["a", "b"]), [2, 0], part_of([4, 5]))
    table.record(table.rows(["b", "a"]), [1, 1], part_of([7, 6]))
    for request_id in ("a", "b", "a"):
        table.forget([request_id])
    assert not table._in_flight
    first, second, unknown = (record.trace() for record in table.take([1, 2, 3]))
    assert (first.response_ids.tolist(), second.response_ids.tolist(), len(unknown)) == ([4, 5, 6], [7], 0)
    assert first.teacher_topk_ids.shape == (3, TOP_K) and unknown.teacher_topk_ids.shape == (0, TOP_K)
    assert [len(record.trace()) for record in table.take([1, 2])] == [0, 0]


def test_a_request_that_goes_on_after_a_preemption_repeats_its_last_token(worker: Worker) -> None:
    """Also on a rank of an engine that records no traces; and whatever became of the batch in the meantime."""
    table = worker.table
    table.rows(["a", "b"]).note_emitted(torch.tensor([[4, 5], [-1, -1]]))
    table.rows(["a", "b"]).note_emitted(torch.tensor([[6, -1], [7, -1]]))
    table.forget(["c"])
    batch = table.rows(["b", "a"])
    assert (table.last_token(batch, 1, 2), table.last_token(batch, 0, 0)) == (6, 7)
    assert not table._batches, "what nobody will fetch"
    assert table.last_token(batch, 1, 3) == 0
    with pytest.raises(RuntimeError, match="vLLM asked for token 3 of a response without drafts for it"):
        table.take([1])


def test_tokens_after_the_last_look_go_nowhere(worker: Worker) -> None:
    """A request that was cut off, by a stop string or by who asked for it, may go on for a step."""
    table = worker.table
    table.record(table.rows(["a", "b"]), [1, 1], part_of([7, 8]))
    assert [len(record.trace()) for record in table.take([1])] == [1]
    table.record(table.rows(["a", "b"]), [1, 1], part_of([7, 8]))
    table.record(table.rows(["b", "a"]), [1, 1], part_of([8, 7]))
    worker.end("a")
    assert [record.trace().response_ids.tolist() for record in table.take([1, 2])] == [[], [8, 8, 8]]
    worker.end("b")
    assert not table._batches and not table._fetched


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_logits_that_are_no_numbers_are_told_once(worker: Worker, model: str) -> None:
    table = worker.table
    table.record(table.rows(["a", "b"]), [1, 1], part_of([4, 5], **{f"{model}_logp": float("nan")}))
    with pytest.raises(FloatingPointError, match=f"the {model}'s logits are NaN or infinite"):
        table.take([1])
    assert table.take([]) == []
