"""kill -9 of any process of a run at any moment, then the same command: the run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from skd_plugin.run_folder import RunFolder
from tests.e2e import sleep_double
from tests.e2e.running import (
    LONGER,
    NUM_STEPS,
    checkpoint,
    finish,
    metrics,
    processes_with,
    start,
    steps,
    traces,
    wait_for_checkpoint,
    wait_for_step,
    wait_until_gone,
)
from tests.waiting import GUARD_S

pytestmark = pytest.mark.e2e
ASLEEP = [
    "openrlhf.train.colocate_all=true",
    "openrlhf.vllm.enable_sleep=true",
    "openrlhf.ds.enable_sleep=true",
    "openrlhf.ds.zero_stage=2",
]


def kill_one(folder: Path, process: subprocess.Popen[str], rng: random.Random, victim: str = "") -> bool:
    """Kills a process of the run, any, or one with `victim` in its command line, at a random moment from now on.

    Returns whether that ended the run; some of Ray's helpers are not missed.
    """
    time.sleep(rng.uniform(0.0, 1.0))
    found = [p for p in [*processes_with(folder), psutil.Process(process.pid)] if victim in command_line(p)]
    chosen = rng.choice(found)
    print(f"with the checkpoint {checkpoint(folder)}: killing {command_line(chosen)[:100]}", flush=True)
    chosen.kill()
    process.communicate(timeout=GUARD_S)
    wait_until_gone(folder)
    return process.returncode != 0


def command_line(process: psutil.Process) -> str:
    """Empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


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


def test_a_killed_run_goes_on_and_engines_sleep_while_it_trains(tmp_path, finished_run):
    """Trainer and engine share one GPU and take turns on it; its figures are those without sleep.

    Killed is the engine: one error, which says how to go on, and that is what is then done. Other processes of a run
    are in test_faults.py and test_train.py.
    """
    folder, env = tmp_path / "run", sleep_double.install(tmp_path / "plugin")
    process = start(folder, *LONGER, *ASLEEP, env=env)
    wait_for_checkpoint(folder, process)
    engine = next(p for p in processes_with(folder) if "EngineCore" in command_line(p))
    engine.kill()
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1 and not processes_with(folder), output
    assert "The run failed:" in output and "host.log" in output
    assert f"The same command goes on from the checkpoint of step {checkpoint(folder)}" in output
    assert "going on from its checkpoint of step" in finish(folder, *LONGER, *ASLEEP, env=env)
    same_run(folder, finished_run[0])
    naps = RunFolder(folder).log.read_text().count(f"{sleep_double.SLEPT} 1")
    assert naps > 12, "after the start, each step and each evaluation"


@pytest.mark.soak
def test_a_killed_asynchronous_run_goes_on_with_what_was_in_its_queue(tmp_path, finished_run):
    """Its steps have the prompts of the synchronous run's steps, each once."""
    folder = tmp_path / "run"
    overrides = [*LONGER, "openrlhf.train.async_enable=true", "openrlhf.train.async_queue_size=2"]
    process = start(folder, *overrides)
    wait_for_checkpoint(folder, process)
    assert kill_one(folder, process, random.Random(0), "SKDPolicy")
    assert "going on from its checkpoint of step" in finish(folder, *overrides)
    assert [r["step"] for r in steps(folder)] == list(range(1, NUM_STEPS + 1))
    assert all(0 <= r["skd/staleness"] <= 2 for r in steps(folder))
    prompts = [sorted((t["step"], t["prompt"]) for t in traces(run)) for run in (folder, finished_run[0])]
    assert prompts[0] == prompts[1]


@pytest.mark.soak
def test_ten_kills_at_random_points(tmp_path, finished_run):
    rng = random.Random(int(os.environ.get("SKD_SOAK_SEED", "1")))
    folder = tmp_path / "run0"
    for number in range(1, 11):
        done = steps(folder)[-1]["step"] if steps(folder) else 0
        process = start(folder, *LONGER)
        wait_for_step(folder, min(done + 1, NUM_STEPS - 2), process)
        if not kill_one(folder, process, rng):  # this run came to its end all the same
            same_run(folder, finished_run[0])
            folder = tmp_path / f"run{number}"
    if steps(folder):
        finish(folder, *LONGER)
        same_run(folder, finished_run[0])
