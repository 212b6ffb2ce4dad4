"""Trains each run of a plan, several sessions at a time, each on cores of its own; what is done stays done.

A session is a process with one Ray and one engine, in which runs follow one another (session.py).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import Run
from session import SESSION, engine_of

from skd_plugin.config.recipe import load_recipe
from skd_plugin.errors import RecipeError
from skd_plugin.host.launch import end_with_the_parent
from skd_plugin.prepare.load_run import load_run
from skd_plugin.run.lock import owned
from skd_plugin.run.places import link_places
from skd_plugin.run.process import run_module
from skd_plugin.run.supervisor import after_the_earlier_run
from skd_plugin.tasks import find_task
from skd_plugin.terminal import plain_console

POLL_S = 0.5
TOO_OFTEN = 2  # sessions without a finished run: then it is not the run that is to blame
ARGUMENTS = "compare.json"  # in a run folder: what the run was made with


def execute(runs: list[Run], folder: Path, jobs: int, session_len: int) -> list[Run]:
    """Returns the runs that failed; the others are finished.

    Args:
        session_len: runs of a session at most. What follows the first one costs no start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not is_done(run, folder)]
    console = plain_console()
    console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already; folders in {folder}")
    waiting, free = deque(sessions(todo, session_len)), core_shares(jobs)
    going: list[Session] = []
    failed: list[Run] = []
    seconds: list[float] = []
    left, in_vain = len(todo), 0
    while waiting or going:
        while waiting and free:
            going.append(Session.start(waiting.popleft(), folder, free.pop(0)))
        time.sleep(POLL_S)
        for session in list(going):
            alive = session.process.is_alive()
            for run in session.finished(folder):
                seconds.append(float((folder / run.name / SESSION).read_text()))
                left -= 1
                rest = f"{left} left, about {left * sum(seconds) / len(seconds) / jobs / 60:.0f} min"
                console.print(f"{run.name}: done ({seconds[-1]:.0f} s); {rest}")
            if not alive:
                going.remove(session)
                free.append(session.cores)
                in_vain = 0 if session.done else in_vain + 1
                if session.runs:
                    broken, *others = session.runs
                    failed.append(broken)
                    left -= 1
                    console.print(f"{broken.name}: FAILED, see {session.log}")
                    waiting.extendleft([others] if others else [])
                if in_vain == TOO_OFTEN and waiting:
                    console.print(f"{in_vain} sessions in a row came to nothing, so no further one is started")
                    failed += [run for group in waiting for run in group]
                    waiting.clear()
    return failed


def sessions(runs: list[Run], session_len: int) -> list[list[Run]]:
    """Runs that may share an engine, together, in the order of their first ones; a seed changes no engine.

    Raises RecipeError: a recipe has not the task that the plan names, so that nothing would be found of it at the end.
    """
    alike: dict[str, list[Run]] = {}
    keys: dict[tuple[str, str], str] = {}
    for run in runs:
        kind = (run.cell, run.method)
        if kind not in keys:
            loaded = load_run(run.recipe, run.overrides)
            known = [find_task(task.name).name for task in loaded.skd.all_tasks]
            if known and run.task not in known:
                raise RecipeError(
                    f"the plan has a task {run.task}, but its recipe {run.recipe.name} measures {', '.join(known)}"
                )
            keys[kind] = json.dumps(engine_of(loaded), sort_keys=True, default=str)
        alike.setdefault(keys[kind], []).append(run)
    cut = [group[at : at + session_len] for group in alike.values() for at in range(0, len(group), session_len)]
    return sorted(cut, key=lambda group: runs.index(group[0]))


@dataclass
class Session:
    runs: list[Run]  # not yet finished, in their order
    log: Path
    cores: set[int]
    process: multiprocessing.Process
    done: int = 0

    @classmethod
    def start(cls, runs: list[Run], folder: Path, cores: set[int]) -> Session:
        """In a fork of this process, which has done its imports."""
        log = folder / f"{runs[0].name}.log"
        for run in runs:
            (folder / run.name / SESSION).unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_session, args=(runs, folder, log, cores))
        process.start()
        return cls(list(runs), log, cores, process)

    def finished(self, folder: Path) -> list[Run]:
        """Those that are since the last call; what they were made with is written beside them."""
        done = []
        while self.runs and (folder / self.runs[0].name / SESSION).exists():
            run = self.runs.pop(0)
            (folder / run.name / ARGUMENTS).write_text(json.dumps(arguments(run)))
            done.append(run)
        self.done += len(done)
        return done


def _session(runs: list[Run], folder: Path, log: Path, cores: set[int]) -> None:
    end_with_the_parent()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # what this process starts inherits it
    with log.open("w") as output, ExitStack() as locks:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        console, folders = plain_console(), []
        for run in runs:
            loaded = load_run(run.recipe, [*run.overrides, f"skd.run_dir={folder / run.name}"])
            locks.enter_context(owned(loaded.folder.path, console.print))
            loaded = after_the_earlier_run(loaded, console)
            link_places(loaded)
            loaded.save()
            folders.append(str(loaded.folder.path))
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        sys.exit(run_module(["session", *folders], log, name=folders[0]))


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
