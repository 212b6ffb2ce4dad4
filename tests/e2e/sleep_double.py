"""A stand-in for vLLM's sleep at level 1, which a CPU has not: while an engine sleeps, both models hold NaN.

vLLM loads it into each of its processes as a plugin, by the entry point that `install` writes. What computes with a
sleeping engine, or sends it weights before it is awake, gets or leaves NaN.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SLEPT = "the double slept at level"  # in the run's log, once a sleep


def install(folder: Path) -> dict[str, str]:
    """Makes the plugin; returns the environment in which processes have it."""
    package = folder / "sleep_double-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: sleep-double\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[vllm.general_plugins]\nsleep = tests.e2e.sleep_double:replace_sleep\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def replace_sleep() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    CPUWorker.sleep, CPUWorker.wake_up = _sleep, _wake_up


def _sleep(self: Any, level: int = 1) -> None:
    print(SLEPT, level, flush=True)
    kept = {}
    for model in (self.model_runner.model, self.model_runner.drafter.model):
        for parameter in model.parameters():
            kept[parameter] = parameter.detach().clone()
            parameter.data.fill_(float("nan"))
    self.kept = kept


def _wake_up(self: Any, tags: list[str] | None = None) -> None:
    if tags is None or "weights" in tags:
        for parameter, value in self.__dict__.pop("kept", {}).items():
            parameter.data.copy_(value)
