"""Steps with traces in a real Ray's object store, in a process of its own; prints what was seen, as JSON.

python -m tests.contract.trace_store_run
"""

from __future__ import annotations

import json
import os
from typing import Any

import ray
import torch

from skd_plugin.core.metrics import figures_of
from skd_plugin.core.trace import Trace
from skd_plugin.host.trace_store import StoredTrace, fetch
from tests.traces import trace_of
from tests.unit.test_trace import assert_equal
from tests.waiting import wait_for

DRAFT_LEN, RESPONSES, TOKENS, STEPS = 2, 6, 300, 3


def make_trace(number: int) -> Trace:
    ids = torch.arange(TOKENS) + number
    return trace_of(ids, teacher_logp=-ids.float(), teacher_topk_ids=ids[:, None].int().repeat(1, 64))


@ray.remote
class Engine:
    """Puts traces into the store as SKDRollout does."""

    def sample(self) -> list[StoredTrace]:
        return [StoredTrace.put(make_trace(number), DRAFT_LEN) for number in range(RESPONSES)]

    def kept(self) -> int:
        """Objects of this process that somebody still refers to."""
        return len(ray._private.worker.global_worker.core_worker.get_all_reference_counts())

    def end(self) -> None:
        os._exit(1)


@ray.remote
class Policy:
    """Fetches as SKDPolicy does, and forgets what it has trained on."""

    def append(self, batch: dict[str, list[ray.ObjectRef | bytes]]) -> list[int]:
        self._traces = fetch(batch["traces"])
        return [int(trace.response_ids[0]) for trace in self._traces]

    def fit(self) -> None:
        self._traces.clear()


def steps(engine: Any, policy: Any) -> dict[str, Any]:
    """OpenRLHF puts an actor's share into the store as well; the last response is filtered out."""
    before, held, fetched = ray.get(engine.kept.remote()), [], []
    for _ in range(STEPS):
        stored = ray.get(engine.sample.remote())
        share = ray.put({"traces": [one.held for one in stored[:-1]]})
        fetched.append(ray.get(policy.append.remote(share)))
        held.append(ray.get(engine.kept.remote()) - before)
        del stored, share
        ray.get(policy.fit.remote())
        wait_for(lambda: ray.get(engine.kept.remote()) <= before, "the end of the last reference to a step's traces")
    return {"held": held, "fetched": fetched}


def message(engine: Any) -> dict[str, int]:
    stored = ray.get(engine.sample.remote())
    for number, one in enumerate(stored):
        trace = make_trace(number)
        assert one.figures == figures_of(trace, DRAFT_LEN) and len(one) == TOKENS
        assert torch.equal(one.drawn.sampled_logp, trace.sampled_logp)
        assert_equal(fetch([one.held])[0], trace)
    context = ray._private.worker.global_worker.get_serialization_context()
    return {"trace": context.serialize(make_trace(0)).total_bytes, "stored": context.serialize(stored[0]).total_bytes}


def death(engine: Any) -> str:
    """What is said of a trace whose engine has died; on the engine's own node it may be there for a second or so."""
    stored = ray.get(engine.sample.remote())
    said: list[str] = []
    engine.end.remote()

    def lost() -> bool:
        try:
            fetch([one.held for one in stored])
        except RuntimeError as error:
            said.append(str(error))
        return bool(said)

    wait_for(lost, "the end of a dead engine's traces")
    return said[0]


if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    engine, policy = Engine.remote(), Policy.remote()
    found = {"steps": steps(engine, policy), "bytes": message(engine), "death": death(engine)}
    ray.shutdown()
    print(json.dumps(found))
