"""Which traces go along with their responses, and which are stored."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import ray
import torch

from skd_plugin.host.trace_store import CARRIED_BYTES, TRACE_KEY, StoredTrace, fetch, for_training
from tests.traces import trace_of
from tests.unit.test_trace import assert_equal


def test_small_ones_go_along_and_all_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    store: dict[str, bytes] = {}

    def put(trace: object) -> str:
        store[str(len(store))] = pickle.dumps(trace)
        return str(len(store) - 1)

    monkeypatch.setattr(ray, "put", put)
    monkeypatch.setattr(ray, "get", lambda refs: [pickle.loads(store[ref]) for ref in refs])
    traces = [
        trace_of(torch.arange(length), teacher_topk_ids=torch.arange(length)[:, None].int().repeat(1, 64))
        for length in (3, 2000, 50, 3000, 0)
    ]
    stored = [StoredTrace.put(trace, 2) for trace in traces]
    assert len(store) == sum(trace.nbytes > CARRIED_BYTES for trace in traces) == 2
    sent: list[StoredTrace] = pickle.loads(pickle.dumps(stored))
    for one, trace in zip(fetch([one.held for one in sent]), traces, strict=True):
        assert_equal(one, trace)
    assert [len(one) for one in sent] == [3, 2000, 50, 3000, 0]


def test_nothing_is_asked_of_ray_where_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda refs: pytest.fail("asked"))
    stored = StoredTrace.put(trace_of(torch.arange(4)), 2)
    assert len(fetch([stored.held])[0]) == 4 and fetch([]) == []


def test_a_batch_for_training_has_what_is_trained_on_alone() -> None:
    stored = [StoredTrace.put(trace_of(torch.arange(length)), 2) for length in (3, 4)]
    info = {TRACE_KEY: stored, "reward": [0.0, 1.0]}
    (batch,) = for_training([SimpleNamespace(info=info)])
    assert batch.info == {TRACE_KEY: [one.held for one in stored], "reward": [0.0, 1.0]}
    assert info[TRACE_KEY] is stored, "the controller still reads what it has sampled"
