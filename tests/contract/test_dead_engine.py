"""vLLM never answers a call that is under way when its engine dies: ours end with the engine's error."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest

# Made once, before the first step; and those in whose place `receive_student` is.
OTHERS = {"__init__", "init_process_group", "update_weight", "update_weight_cuda_ipc"}


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
    calls -= OTHERS | {"generate", "get_num_unfinished_requests"}  # requests end with the engine
    assert {"wake_up", "sleep", "pause_generation", "resume_generation", "reset_prefix_cache"} <= calls

    async def call(name: str) -> None:
        await asyncio.wait_for(getattr(actor, name)(), timeout=20)

    for name in [*calls, "describe_skd", "take_seconds"]:
        with pytest.raises(RuntimeError, match="the engine is dead"):
            asyncio.run(call(name))
