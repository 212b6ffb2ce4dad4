"""The result as tables for a terminal, one a task."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from skd_plugin.evaluate.estimates import Estimate
from skd_plugin.evaluate.result import Result
from skd_plugin.words import short_name

NATS = ("kl", "student_entropy", "teacher_entropy")
WIDTH = 106  # of a table of two students
PLAIN = ("response_len", "accepted_per_block", "tokens_per_forward")


def tables(result: Result) -> Iterator[Table]:
    """Rows are metrics, columns students; of two students there is their difference, too."""
    draft_len = result.settings.draft_len
    for task in result.students[0].tasks:
        table = Table(title=Text(task, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column(Text("mean [95 % interval]"), overflow="fold")
        for student in result.students:
            table.add_column(Text(short_name(student.name)), justify="right", overflow="fold")
        two = len(result.students) == 2
        if two:
            table.add_column("difference", justify="right")
        columns = [student.tasks[task] for student in result.students]
        columns += [result.differences[0].tasks[task]] if two else []
        section = None
        for name in columns[0]:
            if "@" in name and name.startswith("speculation/") and not name.endswith(f"@{draft_len}"):
                continue  # other block lengths are in the file
            if section != name.split("/")[0]:
                section = name.split("/")[0]
                table.add_row(Text(section, style="bold"))
            cells = [_cell(name, column.get(name), signed=place == 2 and two) for place, column in enumerate(columns)]
            table.add_row(Text(_label(name)), *cells)
        yield table


def _label(name: str) -> str:
    return f"  {' '.join(name.split('/')[1:])}{'' if _last(name) in (*NATS, *PLAIN) else ', %'}"


def _last(name: str) -> str:
    return name.split("/")[-1].split("@")[0]


def _cell(name: str, estimate: Estimate | None, *, signed: bool) -> Text:
    """`mean [low, high]`; bold where an interval of a difference leaves 0 out."""
    if estimate is None or estimate.mean is None:
        return Text("-")
    last = _last(name)
    factor, digits = (1, 3) if last in NATS else (1, 2) if last in PLAIN else (100, 1)

    def show(value: float) -> str:
        return f"{factor * value:{'+' if signed else ''}.{digits}f}"

    text, clear = show(estimate.mean), False
    if estimate.low is not None and estimate.high is not None:
        text += f" [{show(estimate.low)}, {show(estimate.high)}]"
        clear = signed and not estimate.low <= 0 <= estimate.high
    return Text(text, style="bold" if clear else "", no_wrap=True)
