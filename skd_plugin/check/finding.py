"""What a check says: one line of the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failed", "not run"]


@dataclass(frozen=True)
class Finding:
    name: str  # what was checked
    found: str
    level: Level = "ok"
    remedy: str = ""  # what to do; of warnings and failures


def exit_status(findings: Iterable[Finding], *, recipe_is_wrong: bool) -> int:
    """0: nothing failed; 1: a check failed; 2: the recipe is wrong. A warning is no failure."""
    if recipe_is_wrong:
        return 2
    return int(any(finding.level == "failed" for finding in findings))


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def first_line(error: BaseException | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
