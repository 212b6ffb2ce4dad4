"""A dataset file of the user's: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from skd_plugin.errors import RecipeError


class Row(NamedTuple):
    line: int  # of the file, from 1
    values: dict[str, Any]


def read_rows(path: Path, *, option: str, column: str | None = None, limit: int | None = None) -> list[Row]:
    """The rows of a file; blank lines are left out.

    Args:
        option: the option that names the file, for the error.
        column: one that every row must have.
        limit: lines that are read at most.

    Raises:
        RecipeError: no such file, or a line that is no row; names the line.
    """
    if not path.is_file():
        raise RecipeError(f"{option}: there is no file {path}")
    rows = []
    for number, line in enumerate(path.read_text().splitlines()[:limit], start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"{path}, line {number}: a line is one JSON object, but this is {line.strip()[:40]}")
        if column is not None and column not in values:
            raise RecipeError(
                f"{path}, line {number} has no column '{column}' (openrlhf.data.input_key); it has {', '.join(values)}"
            )
        rows.append(Row(number, values))
    return rows


def check_references(prompts: Iterable[tuple[str, str | None]], where: str = "") -> None:
    """Raises RecipeError for the first prompt without a reference: which ones are needed is drawn.

    Args:
        prompts: what a person calls each, and its reference.
        where: a reference is looked for, in words.
    """
    for name, reference in prompts:
        if not reference:
            raise RecipeError(f"{name} has no reference{where and ' '}{where}, which skd.rollout.method needs")
