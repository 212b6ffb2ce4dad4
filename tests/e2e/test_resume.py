"""kill -9 of any process of a run at any moment, then the same command: the run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.running import (
    END_LIMIT_S,
    LONGER,
    NUM_STEPS,
    finish,
    metrics,
    processes_with,
    start,
    steps,
    traces,
    wait_for_step,
)

pytestmark = pytest.mark.e2e


def kill_once(folder: Path, rng: random.Random, victim: str = "") -> bool:
    """Kills a process of the run (any, or one with `victim` in its command line) at a random moment of its training.

    Returns whether that ended the run; some of Ray's helpers are not missed.
    """
    process = start(folder, *LONGER)
    done = steps(folder)[-1]["step"] if steps(folder) else 0
    wait_for_step(folder, min(done + 1, NUM_STEPS - 2), process)
    time.sleep(rng.uniform(0.0, 1.0))
    found = [p for p in [*processes_with(folder), psutil.Process(process.pid)] if victim in " ".join(p.cmdline())]
    chosen = rng.choice(found)
    print(f"behind step {steps(folder)[-1]['step']}: killing {' '.join(chosen.cmdline())[:100]}", flush=True)
    chosen.kill()
    process.communicate(timeout=END_LIMIT_S)
    deadline = time.monotonic() + 60
    while processes_with(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not processes_with(folder)
    return process.returncode != 0


def same_run(folder: Path, undisturbed: Path) -> None:
    """No gap, no double line, the same prompts in the same steps, and the same numbers."""
    assert [r["step"] for r in steps(folder)] == list(range(1, NUM_STEPS + 1))
    evaluated = [[r["step"] for r in metrics(run) if "eval/arithmetic/kl" in r] for run in (folder, undisturbed)]
    assert evaluated[0] == evaluated[1] == [0, 4, 8, 12]
    prompts = [sorted((t["step"], t["prompt"]) for t in traces(run)) for run in (folder, undisturbed)]
    assert prompts[0] == prompts[1]
    for mine, theirs in zip(steps(folder), steps(undisturbed), strict=True):
        for name in ("skd/loss", "skd/accept_rate", "lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["step"], name)


def test_a_killed_run_goes_on(tmp_path, finished_run):
    assert kill_once(tmp_path / "run", random.Random(0), "SKDPolicy")
    assert "going on from its checkpoint of step" in finish(tmp_path / "run", *LONGER)
    same_run(tmp_path / "run", finished_run[0])


@pytest.mark.soak
def test_ten_kills_at_random_points(tmp_path, finished_run):
    rng = random.Random(int(os.environ.get("SKD_SOAK_SEED", "1")))
    folder = tmp_path / "run0"
    for number in range(1, 11):
        if not kill_once(folder, rng):  # this run came to its end all the same
            same_run(folder, finished_run[0])
            folder = tmp_path / f"run{number}"
    if steps(folder):
        finish(folder, *LONGER)
        same_run(folder, finished_run[0])
