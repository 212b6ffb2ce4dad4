"""Runs `skd train` for each run of a plan, several at a time, each on cores of its own; what is done stays done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from plan import Run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ARGUMENTS = "compare.json"  # beside a run folder: what the run was made with


def execute(runs: list[Run], folder: Path, jobs: int) -> list[Run]:
    """Returns the runs that failed; the others are finished."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not is_done(run, folder)]
    console = Console(highlight=False)
    console.print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done already; folders in {folder}")
    shares: SimpleQueue[set[int]] = SimpleQueue()
    for share in core_shares(jobs):
        shares.put(share)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("runs", total=len(waiting))

        def work(run: Run) -> bool:
            cores, started = shares.get(), time.monotonic()
            succeeded = train(run, folder, cores)
            shares.put(cores)
            outcome = "done" if succeeded else f"[red]failed[/red], see {folder / run.name}.log"
            progress.console.print(f"{run.name}: {outcome} ({time.monotonic() - started:.0f} s)")
            progress.advance(bar)
            return succeeded

        with ThreadPoolExecutor(jobs) as pool:
            outcomes = list(pool.map(work, waiting))
    return [run for run, succeeded in zip(waiting, outcomes, strict=True) if not succeeded]


def train(run: Run, folder: Path, cores: set[int]) -> bool:
    place = folder / run.name
    command = [sys.executable, "-m", "skd_plugin.cli", "train", str(run.recipe), *run.overrides]
    with (folder / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"skd.run_dir={place}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)  # before it starts anything; children inherit it
        status = process.wait()
    if status == 0:
        (place / ARGUMENTS).write_text(json.dumps(arguments(run)))
    return status == 0


def is_done(run: Run, folder: Path) -> bool:
    path = folder / run.name / ARGUMENTS
    return path.exists() and json.loads(path.read_text()) == arguments(run)


def arguments(run: Run) -> list[str]:
    return [run.recipe.read_text(), *run.overrides]


def core_shares(jobs: int) -> list[set[int]]:
    """The cores that this process may use, dealt out; more jobs than cores share them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [set(cores[job::jobs]) or {cores[job % len(cores)]} for job in range(jobs)]
