"""The asynchronous trainer: what travels with the samples, and how old they may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
import torch

from skd_plugin.core.clock import Clock
from skd_plugin.host.trace_store import TRACE_KEY, Versions
from tests.traces import trace_of


@pytest.fixture
def asynchronous():
    from skd_plugin.host import on_cpu

    on_cpu.install()
    from skd_plugin.host import async_controller

    return async_controller


class Queue:
    def __init__(self) -> None:
        self.items: list = []

    def put(self, item, block: bool) -> None:
        assert isinstance(item, list) and item[0].startswith("reference "), "the queue would read what it holds"
        self.items.append(item)

    def get(self, block: bool):
        return self.items.pop(0)


def test_what_was_measured_travels_with_its_samples(asynchronous, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenRLHF's queue, with the two sides of ours around it, and its own evaluations and end in between."""
    store: list = []
    monkeypatch.setattr(ray, "put", lambda payload: store.append(payload) or f"reference {len(store) - 1}")
    monkeypatch.setattr(ray, "get", lambda reference: store[int(reference.split()[1])])
    queue = Queue()
    generator = object.__new__(asynchronous.SKDGenerator)
    trainer = object.__new__(asynchronous.SKDTrainingActor)
    trainer.clock = Clock()
    into = asynchronous.Tapped(queue, generator._add_sampled)
    out_of = asynchronous.Tapped(queue, trainer._take_sampled)
    for number in (1, 2):
        generator.samples_generator = SimpleNamespace(take_sampled=lambda number=number: f"of step {number}")
        into.put(([f"samples {number}"], {"episode": 0}, None, 0.1), block=True)
        into.put(("eval", number, {}), block=True)
    into.put("done", block=True)
    assert out_of.get(block=True) == (["samples 1"], {"episode": 0}, None, 0.1) and trainer.sampled == "of step 1"
    assert out_of.get(block=True)[0] == "eval" and trainer.sampled == "of step 1"
    assert out_of.get(block=True)[0] == ["samples 2"] and trainer.sampled == "of step 2"
    out_of.get(block=True)
    assert out_of.get(block=True) == "done"


def test_staleness_is_counted_in_updates_and_limited(asynchronous) -> None:
    def sample(*versions: int) -> SimpleNamespace:
        trace = trace_of(torch.arange(len(versions)), student_version=torch.tensor(versions, dtype=torch.int32))
        return SimpleNamespace(info={TRACE_KEY: [SimpleNamespace(versions=Versions.of(trace))]})

    trainer = object.__new__(asynchronous.SKDTrainingActor)
    trainer.args = SimpleNamespace(train=SimpleNamespace(async_queue_size=2))
    assert trainer._staleness([sample(5, 5, 6), sample(), sample(7)], 7) == 5 / 4
    with pytest.raises(RuntimeError, match="step 9 would train on tokens of a student that is 3 updates old"):
        trainer._staleness([sample(5, 8), sample(7)], 8)
    assert trainer._staleness([sample()], 3) == 0.0
