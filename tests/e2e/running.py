"""Starts `skd train` as a user does, and looks at what it writes and which processes it has."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from skd_plugin.config.run import Run
from skd_plugin.run import resume
from skd_plugin.run_folder import RunFolder
from tests.waiting import GUARD_S, wait_for

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
# All is on that can be on at once: two tasks, references beside samples, a gate that is steered, the whole vocabulary,
# a teacher with prompts of its own.
OWN = '{template: "{reference} {input}", max_len: 140}'
ARITHMETIC = f"{{name: arithmetic, train_prompts: 32, eval_prompts: 6, top_k: 1, teacher_prompt: {OWN}}}"
COUNT = f"{{name: {Path(__file__).with_name('count_task.py')}, train_prompts: 16, eval_prompts: 4, max_new_tokens: 5}}"
LONGER = [
    "skd.task=null",
    f"skd.tasks=[{ARITHMETIC}, {COUNT}]",
    "skd.rollout.method=mixed_skd",
    "skd.rollout.top_k={kind: target_acceptance, rate: 0.5, start: 4, gain: 2}",
    "skd.rollout.reference_compat=true",
    "skd.loss.vocabulary=full",
    "openrlhf.train.num_episodes=2",
    "openrlhf.ckpt.save_steps=2",
    "openrlhf.eval.steps=4",
    "skd.traces_per_step=8",
]
NUM_STEPS = 12


def start(
    folder: Path, *overrides: str, recipe: Path = RECIPE, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "skd_plugin.cli", "train", str(recipe), *SMALL, f"skd.run_dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_hear_ctrl_c,
        env=env,
    )


def _hear_ctrl_c() -> None:
    """A shell's background job, which the tests may be, ignores SIGINT, and so would everything it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(folder: Path, *overrides: str, recipe: Path = RECIPE, env: dict[str, str] | None = None) -> str:
    """A run to its end; returns what it printed."""
    process = start(folder, *overrides, recipe=recipe, env=env)
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 0, output
    return output


def metrics(folder: Path) -> list[dict]:
    return RunFolder(folder).metrics.read()


def steps(folder: Path) -> list[dict]:
    """The records of training steps, without those of evaluations."""
    return [record for record in metrics(folder) if "skd/kd_coef" in record]


def traces(folder: Path) -> list[dict]:
    return RunFolder(folder).traces.read()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    def there() -> bool:
        assert process.poll() is None, process.stdout.read()
        return any(record["step"] >= step for record in steps(folder))

    wait_for(there, f"step {step}")


def checkpoint(folder: Path) -> int | None:
    """Step of the last complete checkpoint, from which a killed run goes on."""
    return resume.last_step(Run.load(RunFolder(folder))) if RunFolder(folder).config.exists() else None


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    """A complete one: OpenRLHF has written the last file of it."""

    def there() -> bool:
        assert process.poll() is None, process.stdout.read()
        return checkpoint(folder) is not None

    wait_for(there, "a complete checkpoint")


def wait_until_gone(folder: Path) -> None:
    """Every process of the run."""
    wait_for(lambda: not processes_with(folder), "the end of every process of the run")


def processes_with(folder: Path, name: str = "") -> list[psutil.Process]:
    """Processes of the run, found by the id that each inherits; it begins with the run folder.

    Args:
        name: that is in theirs or in their command line; they end at any time.
    """
    left = []
    for process in psutil.process_iter():
        try:
            own = process.environ().get("SKD_RUN_ID", "").startswith(f"{folder}:")
            if own and name in " ".join([process.name(), *process.cmdline()]):
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
