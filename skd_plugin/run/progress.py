"""Lines and tables about a run, made from the files of its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skd_plugin.run.alarms import Alarms
from skd_plugin.run_folder import RunFolder
from skd_plugin.words import duration

LOSSES = {"skd/loss": "loss", "rl/loss": "policy loss"}


def is_step(record: dict[str, Any]) -> bool:
    """Whether a record is of a training step, and not of an evaluation."""
    return "skd/loss" in record


class Follower:
    """Prints what is new in a run folder since the last look."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self._folder, self._console = folder, console
        records, self._offset = folder.metrics.read_from(0)
        self._first_step: tuple[int, float] | None = None
        self._alarms = Alarms()
        for record in filter(is_step, records):  # of a run that goes on: what was said is not said again
            self._alarms.hear(record)

    def show_news(self, tell: Callable[[str], None]) -> None:
        """
        Args:
            tell: called with the stage of the run.
        """
        status = self._folder.status.read()
        tell(status.get("stage", "starting"))
        records, self._offset = self._folder.metrics.read_from(self._offset)
        for record in records:
            self._console.print(self._line(record, status.get("planned_steps")))
            for words in self._alarms.hear(record) if is_step(record) else ():
                self._console.print(Text(words, "yellow"))

    def _line(self, record: dict[str, Any], planned_steps: int | None) -> str:
        step = record["step"]
        place = f"step {step:>4}" + (f"/{planned_steps}" if planned_steps else "")
        if not is_step(record):
            return "  ".join([place, *(f"{name} {text}" for name, text in _evaluation(record))])
        shown = [key for key in LOSSES if record.get(key) is not None] or ["skd/loss"]
        parts = [f"{LOSSES[key]} {_short(record[key])}" for key in shown]
        parts.append(f"accepted {_percent(record.get('skd/accept_rate'))}")
        if "rl/reward" in record:
            parts.append(f"reward {_short(record['rl/reward'])}")
        parts += [f"{_short(record.get('tokens_per_s'))} tokens/s", self._eta(step, planned_steps)]
        return "  ".join([place, *parts])

    def _eta(self, step: int, planned_steps: int | None) -> str:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = step, now
        steps, seconds = step - self._first_step[0], now - self._first_step[1]
        if not steps or not planned_steps:
            return "eta -"
        return f"eta {duration(seconds / steps * (planned_steps - step))}"


def summary_table(folder: RunFolder, wall_s: float) -> Table:
    """What the run did to the student, before and after."""
    records = folder.metrics.read()
    steps = [r for r in records if is_step(r)]
    evals = [r for r in records if not is_step(r)]
    teacher = {k.replace("teacher_", ""): v for r in evals for k, v in r.items() if "/teacher_" in k}
    student = [r for r in evals if not any("/teacher_" in key for key in r)]
    table = Table(title="Speculative knowledge distillation", title_justify="left")
    for heading in ("", "before", "after", "teacher"):
        table.add_column(heading, justify="left" if not heading else "right")
    for key in student[0] if student else ():
        if key != "step" and not key.endswith("response_len"):
            show = _short if key.endswith("/kl") else _percent  # a task's own metrics are all in [0, 1]
            after = student[-1].get(key) if len(student) > 1 else None
            name = key.removeprefix("eval/").replace("/kl", "/KL to teacher, nats")
            table.add_row(name, show(student[0][key]), show(after), show(teacher.get(key)))
    if steps:
        first, last = steps[0], steps[-1]
        rate = sum(r["tokens_per_s"] for r in steps if r["tokens_per_s"]) / len(steps)
        table.add_row("acceptance", _percent(first.get("skd/accept_rate")), _percent(last.get("skd/accept_rate")), "")
        for key, name in (("skd/loss", "loss, nats a token"), ("rl/reward", "reward")):
            if first.get(key) is not None or last.get(key) is not None:
                table.add_row(name, _short(first.get(key)), _short(last.get(key)), "")
        table.add_row("response tokens/s, training included", "", _short(rate), "")
    table.add_row(f"wall time, {len(steps)} steps", "", duration(wall_s), "")
    return table


def _evaluation(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of an evaluation record, for one line."""
    shown = []
    for key, value in record.items():
        if key == "step" or key.endswith("response_len"):
            continue
        task, name = key.removeprefix("eval/").rsplit("/", 1)
        who = "teacher" if name.startswith("teacher_") else "student"
        name = name.removeprefix("teacher_")
        shown.append((f"{who} {task} {name}", _short(value) if name == "kl" else _percent(value)))
    return shown


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
