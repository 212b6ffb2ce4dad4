"""What host/chunked_actor.py leans on of DeepSpeed: a module's own forward is where its parameters are whole."""

from __future__ import annotations

import json

import pytest

from tests.contract.ranks import run_ranks

STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One process of one rank, on the CPU: ZeRO-3 partitions, gathers and releases as with many."""
    folder = tmp_path_factory.mktemp("deepspeed") / "found"
    run_ranks("zero_steps", {folder: (1, list(map(str, STAGES)))})
    return json.loads((folder / "zero_steps.json").read_text())


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
