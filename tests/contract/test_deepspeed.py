"""What host/chunked_actor.py leans on of DeepSpeed: a module's own forward is where its parameters are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("zero_steps.py")
STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def found() -> dict:
    """One process of one rank, on the CPU: ZeRO-3 partitions, gathers and releases as with many."""
    command = [sys.executable, str(SCRIPT), *map(str, STAGES)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cases(found: dict) -> list[dict]:
    return found["cases"]


@pytest.mark.parametrize("stage", STAGES)
def test_steps_with_a_chunked_head_are_the_hosts(cases: list[dict], stage: int) -> None:
    """Three optimizer steps, head tied or not, gradient foreseen or computed again in the backward pass."""
    own = [case for case in cases if case["stage"] == stage]
    assert len(own) == 4
    for case in own:
        assert case["ours"] == pytest.approx(case["host"], rel=1e-5), case
        assert case["host"][0] != pytest.approx(case["host"][-1], rel=1e-3), "nothing was learnt"


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_seen(cases: list[dict], stage: int) -> None:
    """host/objective.py's `finite_gradients`, in the backward pass of every stage, and not one step too early."""
    for case in cases:
        if case["stage"] == stage:
            assert all(text.startswith("nan: the gradient of step 5 is not finite") for text in case["stopped"]), case


@pytest.mark.parametrize("stage", STAGES)
def test_a_moving_teacher_takes_the_place_of_its_student_and_leaves_it(found: dict, stage: int) -> None:
    """host/moving_teacher.py: also of parameters that ZeRO-3 keeps whole beside their shards."""
    case = found["moved"][str(stage)]
    assert case["distance"] > 1e-2 and case["teacher"] < 1e-6 and case["student"] == 0.0
    assert case["loss"] == pytest.approx(found["moved"]["0"]["loss"], rel=1e-5)
