"""scripts/bench_rollout.py and bench_draft_len.py: what they make of the runs that were measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bench_draft_len
import bench_rollout as script
import pytest
import ways_of_sampling as ways


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`measured(*arguments)`: the turns that a call runs, in which ours takes 2 s, then 4 s, all else 3 s."""
    asked = []

    def make_ways(pair: Any, given: Any) -> dict[Any, Any]:
        def way(name: str) -> Any:
            def run(prompts: Any, length: int, turn: int) -> Any:
                asked.append((name, turn))
                return ways.Run(2.0 * (turn + 1) if name == "ours" else 3.0, 120, 0.5 if name == "ours" else None)

            return run

        return {("two", 0): way("two"), ("ours", 3): way("ours"), ("floor", 3): way("floor")}

    monkeypatch.setattr(script, "make_ways", make_ways)
    monkeypatch.setattr(script, "open_pair", lambda *_: ways.Pair("", "", [[1]] * 8, 64))

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
    assert script.batches(ways.Cell(1, 64), prompts) == [[[0]], [[1]], [[2]], [[3]]]
    assert script.batches(ways.Cell(8, 64), prompts) == [prompts]
    summed = ways.Run.sum([ways.Run(1.0, 30, 1.0), ways.Run(2.0, 10, 0.0)])
    assert summed == ways.Run(3.0, 40, 0.75)


def test_auto_is_beside_the_fixed_length_that_is_the_fastest_over_all_turns() -> None:
    seconds = {"1": (4, 4), "2": (2, 3), "4": (3, 1), "8": (9, 9), "auto": (6, 2)}  # of each turn
    rows = [
        {"requests": "8", "length": "64", "top_k": "0", "draft_len": name, "turn": str(turn), "tokens": "12"}
        | {"seconds": str(taken), "kept": "1.0"}
        for name, turns in seconds.items()
        for turn, taken in enumerate(turns)
    ]
    line = bench_draft_len.table(rows).splitlines()[-1]
    assert line == "| 8 x 64 | all | 100% | 3 | 5 | 6 | 1 | 3 | 0.50 | 0.50 |"
