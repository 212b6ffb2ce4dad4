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
    """`measured(*arguments)`: the table and the output of a call in which each of our steps takes 2 s, TRL's 3 s, and
    the first ones of both much longer.
    """

    def steps(seconds: float) -> list[dict[str, float]]:
        return [{"step_s": 100.0, "tokens": 10.0}] * script.WARM_UP + [{"step_s": seconds, "tokens": 30.0}] * 4

    monkeypatch.setattr(script, "our_steps", lambda *_: steps(2.0))
    monkeypatch.setattr(script, "trl_steps", lambda *_: steps(3.0))

    def run(*arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["bench_step.py", "--out", str(tmp_path), *arguments])
        script.main()
        with (tmp_path / "step.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_each_turn_has_a_line_of_both_and_the_first_steps_do_not_count(
    measured, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured("--turns", "2", "--trl-python", "python")
    assert [(row["turn"], row["trainer"], float(row["step_s"])) for row in rows] == [
        ("0", "ours", 2.0),
        ("0", "trl", 3.0),
        ("1", "ours", 2.0),
        ("1", "trl", 3.0),
    ]
    assert {row["trainer"]: float(row["tokens_per_s"]) for row in rows} == {"ours": 15.0, "trl": 10.0}
    assert "takes 1.50 of ours (1.50 to 1.50)" in capsys.readouterr().out


def test_a_turn_that_was_cut_off_has_no_ratio(script) -> None:
    rows = [("0", "ours", "2"), ("0", "trl", "1"), ("1", "ours", "2")]
    assert script.ratios([dict(zip(("turn", "trainer", "step_s"), row, strict=True)) for row in rows]) == [0.5]
