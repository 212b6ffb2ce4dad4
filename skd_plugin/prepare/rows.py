"""A dataset file of the user's: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
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
    with path.open(encoding="utf-8") as file:  # read by lines: a text may hold what str.splitlines takes for an end
        lines = list(enumerate(islice(file, limit), start=1))
    return [Row(number, _values(line, f"{path}, line {number}", column)) for number, line in lines if line.strip()]


def _values(line: str, where: str, column: str | None) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where} is not JSON: {error}; a line is one JSON object") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: a line is one JSON object, but this is {line.strip()[:40]}")
    if column is not None and column not in values:
        raise RecipeError(f"{where} has no column '{column}' (openrlhf.data.input_key); it has {', '.join(values)}")
    return values


def check_references(prompts: Iterable[tuple[str, str | None]], where: str = "") -> None:
    """Raises RecipeError for the first prompt without a reference: which ones are needed is drawn.

    Args:
        prompts: what a person calls each, and its reference.
        where: a reference is looked for, in words.
    """
    for name, reference in prompts:
        if not reference:
            raise RecipeError(f"{name} has no reference{where and ' '}{where}, which skd.rollout.method needs")
