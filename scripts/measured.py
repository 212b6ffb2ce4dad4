"""The CSV of a benchmark: a line is in it as soon as it is measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[dict[str, str]]:
    """Of a file that is not there: none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: Sequence[str], rows: Iterable[Row], keep: Sequence[Row] = ()) -> list[dict[str, str]]:
    """The lines that are kept, then those that are measured now, each printed too. Returns all, as `read` would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(keep)
        file.flush()
        for row in rows:
            line = {name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}
            writer.writerow(line)
            file.flush()
            print(line, flush=True)
    return read(path)
