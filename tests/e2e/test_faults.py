"""Things that break in the middle of a run: one clear outcome each, and no process left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.running import UNMEASURED, checkpoint, processes_with, start, wait_for_checkpoint
from tests.waiting import GUARD_S

pytestmark = pytest.mark.e2e


def kill_one(folder: Path, name: str) -> str:
    """Output of an endless run in which a process with this name is killed."""
    process = start(folder, "skd.task.train_prompts=4000", *UNMEASURED)
    wait_for_checkpoint(folder, process)
    processes_with(folder, name)[0].kill()
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1, output
    assert not processes_with(folder)
    return output


@pytest.mark.soak  # the same way out as a dead engine has, which is in test_resume.py
def test_a_dead_rollout_actor_ends_the_run_with_one_error(tmp_path: Path) -> None:
    output = kill_one(tmp_path, "ConfiguredRollout")
    assert "The run failed:" in output and "host.log" in output
    assert "The same command goes on from the checkpoint of step" in output
    whole = tmp_path / "checkpoints" / "_actor" / f"global_step{checkpoint(tmp_path)}"
    assert list(whole.glob("*model_states.pt"))


@pytest.mark.soak  # what is said of it is in tests/unit/test_launch.py
def test_a_full_disk_ends_the_run_with_advice(tmp_path: Path) -> None:
    """/dev/full answers every write with "no space left on device"."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "traces.jsonl").symlink_to("/dev/full")
    process = start(folder, *UNMEASURED)
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1, output
    assert "No space left on device. Make room, or point skd.run_dir at another disk" in output
    assert not processes_with(folder)


@pytest.mark.soak  # what it rests on is in tests/contract/test_openrlhf.py
def test_an_engine_that_does_not_start_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *UNMEASURED, "skd.vllm={kv_cache_memory_bytes: 1000}")
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1, output
    assert "The run failed: the engine did not start: ValueError: No available memory for the cache blocks." in output
    assert not processes_with(tmp_path / "run")
