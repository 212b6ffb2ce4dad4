"""What checks say: each finding is a line of the table in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from skd_plugin.config.teacher import ONLY
from skd_plugin.words import count

Level = Literal["ok", "warning", "failed", "not run"]
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "not run": "dim"}


@dataclass(frozen=True)
class Finding:
    name: str  # what was checked
    found: str
    level: Level = "ok"
    remedy: str = ""  # what to do; of warnings and failures

    def of_teacher(self, name: str) -> Finding:
        """Of one of several."""
        return self if name == ONLY else replace(self, name=f"{self.name} ({name})")


def exit_status(findings: Iterable[Finding]) -> int:
    """0: nothing failed; 1: a check failed; 2: the recipe is wrong. A warning is no failure."""
    failed = {finding.name for finding in findings if finding.level == "failed"}
    return 2 if "recipe" in failed else int(bool(failed))


def findings_table(findings: Sequence[Finding], title: str) -> Table:
    table = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("check", max_width=22, ratio=1)
    table.add_column("found", ratio=4, overflow="fold")
    table.add_column("", justify="right", no_wrap=True, min_width=7)
    for finding in findings:
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n-> {finding.remedy}", style=STYLES[finding.level])
        table.add_row(Text(finding.name), found, Text(finding.level, style=STYLES[finding.level]))
    return table


def verdict(findings: Sequence[Finding]) -> Text:
    """One sentence below the table."""
    levels = Counter(finding.level for finding in findings)
    if levels["failed"]:
        return Text(f"{count(levels['failed'], 'check')} failed. Do what the lines with -> say.", style="bold red")
    if levels["warning"]:
        return Text(f"Nothing failed; {count(levels['warning'], 'warning')} to read.", style="yellow")
    return Text("All good.", style="bold green")
