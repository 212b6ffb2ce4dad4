"""scripts/bench_rollout.py: what it makes of the runs that were measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bench_rollout as script
import pytest


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`measured(*arguments)`: the turns that a call runs, in which ours takes 2 s, then 4 s, all else 3 s."""
    asked = []

    def make_ways(pair: Any, given: Any) -> dict[Any, Any]:
        def way(name: str) -> Any:
            def run(prompts: Any, length: int, turn: int) -> Any:
                asked.append((name, turn))
                return script.Run(2.0 * (turn + 1) if name == "ours" else 3.0, 120, 0.5 if name == "ours" else None)

            return run

        return {("two", 0): way("two"), ("ours", 3): way("ours"), ("floor", 3): way("floor")}

    monkeypatch.setattr(script, "make_ways", make_ways)
    monkeypatch.setattr(script, "open_pair", lambda *_: script.Pair("", "", [[1]] * 8, 64))

    def run(*arguments: str) -> list[tuple[str, int]]:
        asked.clear()
        cells = ["--cells", "8x64", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["bench_rollout.py", *cells, *arguments])
        script.main()
        return [one for one in asked if one[1] >= 0]

    return run


def test_ratios_are_of_runs_of_the_same_turn(measured, capsys: pytest.CaptureFixture[str]) -> None:
    measured("--turns", "2")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| 8 x 64 | 3 | 50% | 45 | 1.12 (0.75 to 1.50) |")
    assert line.endswith("| 1.12 (0.75 to 1.50) |  |"), "vllm, two, assisted: only one of them was measured"


def test_a_call_goes_on_where_the_last_one_ended(measured) -> None:
    assert measured("--turns", "1") == [("two", 0), ("ours", 0), ("floor", 0)]
    assert measured("--turns", "2") == [("two", 1), ("ours", 1), ("floor", 1)]
    assert measured("--turns", "2") == []


def test_short_cells_are_of_several_batches() -> None:
    prompts = [[number] for number in range(8)]
    assert script.batches(script.Cell(1, 64), prompts) == [[[0]], [[1]], [[2]], [[3]]]
    assert script.batches(script.Cell(8, 64), prompts) == [prompts]
    summed = script.Run.sum([script.Run(1.0, 30, 1.0), script.Run(2.0, 10, 0.0)])
    assert summed == script.Run(3.0, 40, 0.75)
