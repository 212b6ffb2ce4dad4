"""The dry run: one real step of the recipe, by `skd train`'s own way, in a run folder that is thrown away."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skd_plugin.check.findings import Finding
from skd_plugin.check.memory_model import in_gib
from skd_plugin.config.host_options import host_defaults
from skd_plugin.config.run import Run
from skd_plugin.prepare.load_run import load_run
from skd_plugin.run.supervisor import supervise
from skd_plugin.run_folder import Record, RunFolder
from skd_plugin.words import duration

MEMORY_POLL_S = 1.0


def one_step(recipe: str, overrides: Sequence[str], run: Run, folder: Path) -> Run:
    """The recipe with prompts for one step, without evaluation and checkpoints."""
    prompts = {**host_defaults(), **run.host}["rollout.batch_size"]
    shorter = [
        f"skd.run_dir={folder}",
        "skd.eval.teacher=false",
        "skd.eval.at_start=false",
        "openrlhf.train.num_episodes=1",
        "openrlhf.ckpt.save_steps=-1",
        "openrlhf.ckpt.load_enable=false",
        f"openrlhf.data.max_samples={prompts}",
    ]
    if run.skd.task is not None:
        shorter += [f"skd.task.train_prompts={prompts}", "skd.task.eval_prompts=1"]
    if run.skd.tasks:
        shorter.append("skd.tasks=" + json.dumps([_shortened(task.model_dump(), prompts) for task in run.skd.tasks]))
    short = load_run(recipe, [*overrides, *shorter])
    return replace(short, host={**short.host, "eval.dataset": None})  # a task names one whatever the recipe says


def _shortened(task: dict[str, Any], prompts: int) -> dict[str, Any]:
    """The task with no more prompts than one step needs; "full" stays, as nobody knows how many those are."""
    limits = {"train_prompts": prompts, "eval_prompts": 1}
    return task | {name: min(task[name], limit) for name, limit in limits.items() if task[name] != "full"}


def run_dry(recipe: str, overrides: Sequence[str], run: Run) -> list[Finding]:
    """The temporary folder is made beside the run's, on the disk that the run will use.

    Raises:
        KeyboardInterrupt: Ctrl-C; everything that was started has been ended.
    """
    run_dir = run.folder.path
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}.dry-run-", dir=run_dir.parent))
    try:
        short = one_step(recipe, overrides, run, folder)
        with _MemoryPeak() as peak, redirect_stdout(io.StringIO()):  # progress and table are for real runs
            status = supervise(short)
    except BaseException:
        shutil.rmtree(folder)
        raise
    if status == 130:
        shutil.rmtree(folder)
        raise KeyboardInterrupt
    findings = report(RunFolder(folder), status, peak.bytes_of_gpu)
    if all(finding.level != "failed" for finding in findings):  # else its log is named in the table
        shutil.rmtree(folder)
    return findings


def report(folder: RunFolder, status: int, peak: dict[int, int]) -> list[Finding]:
    """From what the step left in its run folder."""
    log = f"read {folder.log}"
    if status != 0:
        error = folder.status.read().get("error") or f"skd train ended with status {status}"
        return [Finding("dry run", error, "failed", log)]
    steps = [record for record in folder.metrics.read() if "skd/loss" in record]
    if not steps:
        return [Finding("dry run", "it ended without a step", "failed", log)]
    findings = [_step(steps[-1], log), Finding("dry run: time", _times(steps[-1]))]
    if peak:
        found = ", ".join(f"GPU {gpu} {in_gib(used)}" for gpu, used in sorted(peak.items()))
        findings.append(Finding("dry run: memory", f"peak, whatever else runs there included: {found}"))
    return findings


def _step(step: Record, log: str) -> Finding:
    loss = step["skd/loss"]
    if loss is None or not math.isfinite(loss):
        return Finding("dry run", f"one step ran, but its loss is {loss}", "failed", log)
    found = f"one step: loss {loss:.4g} nats a token, {step['skd/accept_rate']:.1%} of the proposals accepted"
    return Finding("dry run", found)


def _times(step: Record) -> str:
    parts = [
        f"{name} {duration(seconds) if seconds >= 60 else f'{seconds:.1f}s'}"
        for name in ("rollout", "train", "sync")
        if (seconds := step.get(f"time/{name}")) is not None
    ]
    rate = step.get("tokens_per_s")
    return ", ".join(parts) + (f"; {rate:,.0f} response tokens a second" if rate else "") + " (a first step is slow)"


class _MemoryPeak:
    """Most memory in use on each GPU of this machine while it is open; empty without one."""

    def __init__(self) -> None:
        self.bytes_of_gpu: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _MemoryPeak:
        if torch.cuda.is_available() and importlib.util.find_spec("pynvml"):  # torch asks the driver through it
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(MEMORY_POLL_S):
            for gpu in range(torch.cuda.device_count()):
                used = torch.cuda.device_memory_used(gpu)
                self.bytes_of_gpu[gpu] = max(used, self.bytes_of_gpu.get(gpu, 0))
