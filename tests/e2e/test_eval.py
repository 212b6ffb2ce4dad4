"""`skd eval` as a user gives it, with the teacher as its own student: every metric of the pair is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import RECIPE

pytestmark = pytest.mark.e2e

TEACHER = RECIPE.parent / "models" / "arithmetic" / "teacher"
PROMPTS = 8


def test_the_teacher_as_its_own_student(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    command = [sys.executable, "-m", "skd_plugin.cli", "eval", str(RECIPE), f"skd.task.eval_prompts={PROMPTS}"]
    done = subprocess.run(
        [*command, "--student", str(TEACHER), "--samples", "2", "--out", str(out)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "greedy accuracy, %" in done.stdout
    result = json.loads(out.read_text())
    estimates = result["students"][0]["tasks"]["arithmetic"]
    assert all(estimate["n"] == PROMPTS for estimate in estimates.values())
    mean = {name: estimate["mean"] for name, estimate in estimates.items()}
    for text in ("sampled", "greedy", "references"):
        assert abs(mean[f"distance/{text}/kl"]) < 1e-4
        assert mean[f"distance/{text}/student_entropy"] == pytest.approx(
            mean[f"distance/{text}/teacher_entropy"], abs=1e-4
        )
    assert mean["speculation/sampled/acceptance_rate"] == pytest.approx(1.0, abs=0.01)
    assert mean["speculation/greedy/tokens_per_forward@2"] > 2.7  # 3, but for the end of a response
    # The teacher knows this task: alone in plain vLLM, as SKD's teacher, and from its own beginnings.
    assert mean["scores/greedy/accuracy"] == mean["prefixes/teacher_alone"] == 1.0
    assert mean["prefixes/teacher/0.5"] > 0.8 and mean["scores/greedy/ended"] == 1.0
    assert mean["scores/sampled/pass@1"] == mean["scores/sampled/accuracy"]
