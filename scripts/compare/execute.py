"""Runs `skd train` for each run of a plan, several at a time, each on cores of its own; what is done stays done."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import Run
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from skd_plugin.cli import main
from skd_plugin.config.recipe import load_recipe
from skd_plugin.host.launch import end_with_the_parent
from skd_plugin.terminal import plain_console

POLL_S = 0.5
ARGUMENTS = "compare.json"  # in a run folder: what the run was made with


def execute(runs: list[Run], folder: Path, jobs: int) -> list[Run]:
    """Returns the runs that failed; the others are finished."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = deque(run for run in runs if not is_done(run, folder))
    console = plain_console()
    console.print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done already; folders in {folder}")
    if not waiting:
        return []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    free, going, failed = core_shares(jobs), [], []
    # Drawn from here only: a thread that holds a lock would take it with it into a fork.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("runs", total=len(waiting))
        while waiting or going:
            while waiting and free:
                going.append(Going.start(waiting.popleft(), folder, free.pop(0)))
            time.sleep(POLL_S)
            for one in [one for one in going if not one.process.is_alive()]:
                going.remove(one)
                free.append(one.cores)
                succeeded = one.end(folder)
                failed += [] if succeeded else [one.run]
                outcome = "done" if succeeded else f"FAILED, see {folder / one.run.name}.log"
                progress.console.print(f"{one.run.name}: {outcome} ({time.monotonic() - one.started:.0f} s)")
                progress.advance(bar)
            progress.refresh()
    return failed


@dataclass
class Going:
    """`skd train` in a fork of this process, which has done its imports."""

    run: Run
    cores: set[int]
    process: multiprocessing.Process
    started: float

    @classmethod
    def start(cls, run: Run, folder: Path, cores: set[int]) -> Going:
        command = ["train", str(run.recipe), *run.overrides, f"skd.run_dir={folder / run.name}"]
        process = multiprocessing.get_context("fork").Process(
            target=_command, args=(command, folder / f"{run.name}.log", cores)
        )
        process.start()
        return cls(run, cores, process, time.monotonic())

    def end(self, folder: Path) -> bool:
        self.process.join()
        if self.process.exitcode == 0:
            (folder / self.run.name / ARGUMENTS).write_text(json.dumps(arguments(self.run)))
        return self.process.exitcode == 0


def _command(arguments: list[str], log: Path, cores: set[int]) -> None:
    end_with_the_parent()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # what this process starts inherits it
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(main(arguments))


def is_done(run: Run, folder: Path) -> bool:
    path = folder / run.name / ARGUMENTS
    return path.exists() and json.loads(path.read_text()) == arguments(run)


def arguments(run: Run) -> dict[str, Any]:
    """The recipe with its bases and the run's own options."""
    return load_recipe(run.recipe, run.overrides)


def core_shares(jobs: int) -> list[set[int]]:
    """The cores that this process may use, dealt out; more jobs than cores share them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [set(cores[job::jobs]) or {cores[job % len(cores)]} for job in range(jobs)]
