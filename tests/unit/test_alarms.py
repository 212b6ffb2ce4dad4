"""Which runs sound an alarm, and that each sounds once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from skd_plugin.run.alarms import STEPS, Alarms
from skd_plugin.run.progress import Follower
from skd_plugin.run_folder import RunFolder

HEALTHY = {
    "skd/loss": 0.1,
    "skd/truncated_frac": 0.1,
    "skd/response_len": 40.0,
    "skd/student_entropy": 0.8,
    "skd/teacher_entropy": 0.4,
}


def said_in(*spans: tuple[int, dict[str, Any]]) -> list[str]:
    """What is said in a run of so many steps of each kind."""
    alarms = Alarms()
    return [words for count, changes in spans for _ in range(count) for words in alarms.hear(HEALTHY | changes)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skd/truncated_frac": 0.6}, "60% of the responses reach the length limit (10% at first)"),
        ({"skd/response_len": 90.0}, "responses have grown from 40 to 90 tokens"),
        (
            {"skd/student_entropy": 0.09},
            "entropy has fallen from 0.8 to 0.09 nats a token, far below the teacher's 0.4",
        ),
    ],
)
def test_each_failure_is_said_once_with_its_remedy(changes: dict[str, float], words: str) -> None:
    (said,) = said_in((10, {}), (40, changes), (10, {}), (10, changes))
    assert words in said and said.startswith("Attention: over the last 5 steps, ") and "skd." in said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skd/truncated_frac": 0.5},
        {"skd/response_len": 79.0},
        {"skd/response_len": 90.0, "skd/truncated_frac": 0.9, "skd/horizon": 90.0},  # it grew
        {"skd/student_entropy": 0.11},  # falls, and so it should
        {"skd/student_entropy": 0.05, "skd/teacher_entropy": 0.1},  # a teacher that is as sure
        {"skd/student_entropy": None, "skd/teacher_entropy": None, "skd/truncated_frac": None},
    ],
)
def test_a_run_that_learns_is_left_alone(changes: dict[str, float]) -> None:
    assert not said_in((10, {}), (40, changes))


def test_a_single_step_is_no_alarm_and_a_run_that_began_so_is_none() -> None:
    assert not said_in((10, {}), (1, {"skd/response_len": 150.0}), (10, {}))
    assert not said_in((20, {"skd/truncated_frac": 0.7}))
    assert not said_in((5, {}), (STEPS - 1, {"skd/truncated_frac": 1.0}))


def test_the_terminal_says_it_and_not_again_after_a_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    printed = io.StringIO()
    follower = Follower(folder, Console(file=printed, width=500))
    for step in range(1, 21):
        folder.metrics.append(
            {"step": step, "tokens_per_s": 1.0, **HEALTHY, "skd/response_len": 40.0 * (1 + step // 8)}
        )
    follower.show_news(lambda stage: None)
    assert printed.getvalue().count("responses have grown from 40 to ") == 1
    again = io.StringIO()
    follower = Follower(folder, Console(file=again, width=500))
    folder.metrics.append({"step": 21, "tokens_per_s": 1.0, **HEALTHY, "skd/response_len": 200.0})
    follower.show_news(lambda stage: None)
    assert "step   21" in again.getvalue() and "Attention" not in again.getvalue()
