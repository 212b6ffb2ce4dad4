"""vLLM never answers a call that is under way when its engine dies: ours end with the engine's error."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest

# Those in whose place `receive_student` is, and requests, which end with the engine.
OTHERS = {"__init__", "update_weight", "update_weight_cuda_ipc", "generate", "get_num_unfinished_requests"}
ARGUMENTS = {"init_process_group": 7}  # their number


class Dead:
    """An engine that answers nothing."""

    errored, dead_error = True, RuntimeError("the engine is dead")

    def __getattr__(self, name: str):
        async def never(*args, **kwargs):
            await asyncio.Event().wait()

        return never


def test_every_call_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from skd_plugin.host import rollout_actor

    monkeypatch.setattr(rollout_actor, "ENGINE_WATCH_S", 0.01)
    actor = object.__new__(rollout_actor.SKDRollout)
    vars(actor).update(llm=Dead(), _student_version=0, _begun=SimpleNamespace())
    host = vars(rollout_actor.HostRollout).items()
    calls = {name for name, method in host if inspect.isfunction(method) and "self.llm." in inspect.getsource(method)}
    calls -= OTHERS
    assert {"wake_up", "sleep", "pause_generation", "resume_generation", "reset_prefix_cache", *ARGUMENTS} <= calls

    async def call(name: str) -> None:
        await asyncio.wait_for(getattr(actor, name)(*[None] * ARGUMENTS.get(name, 0)), timeout=20)

    for name in [*calls, "describe_skd", "take_seconds"]:
        with pytest.raises(RuntimeError, match="the engine is dead"):
            asyncio.run(call(name))
