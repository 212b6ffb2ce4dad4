"""scripts/bench_step.py: what it makes of the steps that were measured."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("bench_step", ROOT / "scripts" / "bench_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measured(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`measured(*arguments)`: the table and the output of a call in which each of our steps takes 2 s, TRL's 3 s and
    4 s, and the first ones of all much longer.
    """

    def steps(seconds: float) -> list[dict[str, float]]:
        return [{"step_s": 100.0, "tokens": 10.0}] * 3 + [{"step_s": seconds, "tokens": 30.0}] * 4

    monkeypatch.setattr(script, "our_steps", lambda *_: steps(2.0))
    monkeypatch.setattr(script, "trl_steps", lambda _, job: steps({"distillation": 3.0, "gkd": 4.0}[job["trainer"]]))

    def run(*arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["bench_step.py", "--out", str(tmp_path), *arguments])
        script.main()
        with (tmp_path / "step.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_each_turn_has_a_line_of_each_trainer_and_the_first_steps_do_not_count(
    measured, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured("--turns", "2", "--trl-python", "python", "skd.rollout.draft_len=4")
    one_turn = [("ours", 2.0), ("distillation", 3.0), ("gkd", 4.0)]
    assert [(row["turn"], row["trainer"], float(row["step_s"])) for row in rows] == [
        (turn, *line) for turn in "01" for line in one_turn
    ]
    assert {row["trainer"]: float(row["tokens_per_s"]) for row in rows} == {"ours": 15, "distillation": 10, "gkd": 7.5}
    assert [row["options"] for row in rows[:3]] == ["skd.rollout.draft_len=4", "", ""]
    out = capsys.readouterr().out
    assert "quickstart: a step of TRL's distillation takes 1.50 of ours (1.50 to 1.50)" in out
    assert "quickstart: a step of TRL's gkd takes 2.00 of ours" in out


def test_a_call_replaces_the_lines_of_its_pair_and_keeps_those_of_another(measured) -> None:
    measured("--turns", "2", "--trl-python", "python", "--pair", "smollm2")
    measured("--turns", "2", "--trl-python", "python")
    rows = measured("--turns", "1", "--trl-python", "python", "--beside", "gkd")
    assert [(row["pair"], row["trainer"]) for row in rows] == [
        *[("smollm2", trainer) for trainer in ("ours", "distillation", "gkd")] * 2,
        ("quickstart", "ours"),
        ("quickstart", "gkd"),
    ]


def test_a_turn_that_was_cut_off_has_no_ratio(script) -> None:
    rows = [("0", "ours", "2"), ("0", "gkd", "1"), ("1", "ours", "2")]
    lines = [dict(zip(("pair", "turn", "trainer", "step_s"), ("quickstart", *row), strict=True)) for row in rows]
    assert script.ratios(lines, "quickstart", "gkd") == [0.5]
    assert script.ratios(lines, "smollm2", "gkd") == []
