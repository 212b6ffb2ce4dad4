"""What the terminal shows of a run folder, made from files as a run leaves them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from skd_plugin.run.progress import Follower, summary_table
from skd_plugin.run_folder import RunFolder, Status
from skd_plugin.terminal import plain_console

STEP = {"skd/loss": 0.5, "skd/accept_rate": 0.25, "skd/kl": 0.3, "tokens_per_s": 200.0}


class Folder:
    """A run folder and what a follower has printed of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.stages, self._out = path, [], io.StringIO()
        self.console = plain_console(file=self._out, width=200)

    def write(self, record: dict[str, Any] | str) -> None:
        text = record if isinstance(record, str) else json.dumps(record) + "\n"
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(text)

    def shown(self) -> list[str]:
        lines = self._out.getvalue().splitlines()
        self._out.truncate(0)
        self._out.seek(0)
        return lines


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_only_news_are_shown(folder: Folder) -> None:
    folder.write({"step": 1, **STEP})
    follower = Follower(RunFolder(folder.path), folder.console)
    follower.show_news(folder.stages.append)
    assert folder.shown() == [], "an earlier line is no news"
    folder.write({"step": 2, **STEP})
    folder.write({"step": 3, **STEP})
    follower.show_news(folder.stages.append)
    assert [line.split()[1] for line in folder.shown()] == ["2", "3"]
    follower.show_news(folder.stages.append)
    assert folder.shown() == []


def test_half_written_line_waits_for_its_end(folder: Folder) -> None:
    follower = Follower(RunFolder(folder.path), folder.console)
    text = json.dumps({"step": 7, **STEP}) + "\n"
    folder.write({"step": 6, **STEP})
    folder.write(text[:30])
    follower.show_news(folder.stages.append)
    assert [line.split()[1] for line in folder.shown()] == ["6"]
    folder.write(text[30:])
    follower.show_news(folder.stages.append)
    assert [line.split()[1] for line in folder.shown()] == ["7"]


def test_metrics_are_read_from_an_offset(folder: Folder) -> None:
    metrics = RunFolder(folder.path).metrics
    assert metrics.read_from(0) == ([], 0)
    folder.write({"step": 1})
    records, offset = metrics.read_from(0)
    assert records == [{"step": 1}]
    folder.write({"step": 2, "text": "ü"})
    records, end = metrics.read_from(offset)
    assert records == [{"step": 2, "text": "ü"}]
    assert end == metrics.path.stat().st_size


def test_step_line_has_its_figures(folder: Folder) -> None:
    Status(folder.path).stage("training", planned_steps=40)
    follower = Follower(RunFolder(folder.path), folder.console)
    folder.write({"step": 3, **STEP, "rl/reward": 0.625})
    follower.show_news(folder.stages.append)
    (line,) = folder.shown()
    assert folder.stages == ["training"]
    for text in ("3/40", "0.5", "25.0 %", "reward 0.625", "200 tokens/s", "eta -"):
        assert text in line, line


def test_figure_that_does_not_exist_is_a_dash(folder: Folder) -> None:
    follower = Follower(RunFolder(folder.path), folder.console)
    folder.write({"step": 1, "skd/loss": None, "skd/accept_rate": None, "skd/kl": None, "tokens_per_s": None})
    folder.write({"step": 1, "eval/heldout/kl": None, "eval/heldout/response_len": 3.0})
    follower.show_news(folder.stages.append)
    lines = folder.shown()
    assert len(lines) == 2 and "loss -" in lines[0] and "kl -" in lines[1]


def test_time_left_follows_the_steps_seen(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("skd_plugin.run.progress.time.monotonic", lambda: now[0])
    Status(folder.path).stage("training", planned_steps=12)
    follower = Follower(RunFolder(folder.path), folder.console)
    for step, at in ((2, 100.0), (3, 130.0), (4, 150.0)):
        now[0] = at
        folder.write({"step": step, **STEP})
        follower.show_news(folder.stages.append)
    etas = [line.partition("eta ")[2] for line in folder.shown()]
    assert etas == ["-", "4m30s", "3m20s"]  # 9 steps of 30 s; 8 steps of 25 s


def test_evaluation_line(folder: Folder) -> None:
    follower = Follower(RunFolder(folder.path), folder.console)
    folder.write({"step": 0, "eval/arithmetic/teacher_accuracy": 0.9375})
    folder.write({"step": 0, "eval/arithmetic/accuracy": 0.125, "eval/arithmetic/kl": 0.75})
    follower.show_news(folder.stages.append)
    teacher, student = folder.shown()
    assert "teacher" in teacher and "93.8 %" in teacher
    assert "teacher" not in student and "12.5 %" in student and "0.75" in student


def rows_of(folder: Folder, wall_s: float) -> dict[str, list[str]]:
    table = summary_table(RunFolder(folder.path), wall_s)
    columns = [list(column.cells) for column in table.columns]
    return {name: cells for name, *cells in zip(*columns, strict=True)}


def test_summary_sets_before_against_after(folder: Folder) -> None:
    folder.write({"step": 0, "eval/arithmetic/teacher_accuracy": 0.75, "eval/arithmetic/teacher_response_len": 9.0})
    for step, accuracy, kl in ((0, 0.25, 0.8), (50, 0.375, 0.4), (100, 0.5, 0.125)):
        folder.write({"step": step, "eval/arithmetic/accuracy": accuracy, "eval/arithmetic/kl": kl})
    folder.write({"step": 1, **STEP, "skd/loss": 2.0, "tokens_per_s": 100.0})
    folder.write({"step": 100, **STEP, "skd/accept_rate": 0.875, "tokens_per_s": 300.0})
    rows = rows_of(folder, 3725)
    assert rows["arithmetic/accuracy"] == ["25.0 %", "50.0 %", "75.0 %"]
    kl = next(cells for name, cells in rows.items() if name.lower().startswith("arithmetic/kl"))
    assert kl == ["0.8", "0.125", "-"]
    assert rows["acceptance"][:2] == ["25.0 %", "87.5 %"]
    assert next(c for name, c in rows.items() if name.startswith("loss"))[:2] == ["2", "0.5"]
    assert "200" in next(c for name, c in rows.items() if "tokens/s" in name)
    assert "1h02m" in next(c for name, c in rows.items() if name.startswith("wall time"))


def test_summary_of_a_run_without_steps_or_evaluations(folder: Folder) -> None:
    assert len(rows_of(folder, 5)) == 1
    folder.write({"step": 0, "eval/arithmetic/accuracy": 0.25})
    assert rows_of(folder, 5)["arithmetic/accuracy"] == ["25.0 %", "-", "-"]


HOSTILE = "[/INST] [a, b] [red]x[/red] :warning: \\[c]"


def test_names_of_metrics_are_no_markup(folder: Folder) -> None:
    follower = Follower(RunFolder(folder.path), folder.console)
    folder.write({"step": 0, f"eval/{HOSTILE}/accuracy": 0.5})
    follower.show_news(folder.stages.append)
    folder.console.print(summary_table(RunFolder(folder.path), 1.0))
    line, *table = folder.shown()
    assert HOSTILE in line and any(HOSTILE in row for row in table)
