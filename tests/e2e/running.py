"""Starts `skd train` as a user does, and looks at what it writes and which processes it has."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL = [
    "skd.task.train_prompts=24",
    "skd.task.eval_prompts=8",
    "skd.rollout.max_new_tokens=32",
    "openrlhf.rollout.batch_size=8",
    "openrlhf.rollout.micro_batch_size=8",
    "openrlhf.train.batch_size=8",
    "openrlhf.train.micro_batch_size=4",
    "openrlhf.ckpt.save_steps=1",
]
UNMEASURED = ["skd.eval.teacher=false", "skd.eval.at_start=false"]
# Two episodes of six steps, a checkpoint at every other step, evaluations at every fourth, every response recorded.
LONGER = [
    "skd.task.train_prompts=48",
    "openrlhf.train.num_episodes=2",
    "openrlhf.ckpt.save_steps=2",
    "openrlhf.eval.steps=4",
    "skd.traces_per_step=8",
]
NUM_STEPS = 12
START_LIMIT_S = 400
END_LIMIT_S = 240  # a guard against a hang, wide enough for a busy machine


def start(folder: Path, *overrides: str, recipe: Path = RECIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "skd_plugin.cli", "train", str(recipe), *SMALL, f"skd.run_dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_hear_ctrl_c,
    )


def _hear_ctrl_c() -> None:
    """A shell's background job, which the tests may be, ignores SIGINT, and so would everything it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(folder: Path, *overrides: str, recipe: Path = RECIPE) -> str:
    """A run to its end; returns what it printed."""
    process = start(folder, *overrides, recipe=recipe)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(folder: Path) -> list[dict]:
    """The records of training steps, without those of evaluations."""
    return [record for record in metrics(folder) if "skd/kd_coef" in record]


def traces(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not any(record["step"] >= step for record in steps(folder)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no step {step} after {START_LIMIT_S} s"
        time.sleep(0.2)


def processes_with(folder: Path) -> list[psutil.Process]:
    """Processes of the run, found by the id that each inherits; it begins with the run folder."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SKD_RUN_ID", "").startswith(f"{folder}:"):
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
