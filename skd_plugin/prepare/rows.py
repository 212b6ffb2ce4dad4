"""A dataset file of the user's: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from skd_plugin.config.host_options import HostOptions
from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import render_prompts
from skd_plugin.words import first_line


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


def make_prompts(
    rows: Sequence[Mapping[str, Any]], options: HostOptions, tokenizer: Any, where: str = ""
) -> list[str]:
    """The prompts that OpenRLHF will make of the rows.

    Args:
        where: the rows are, for the error.

    Raises:
        RecipeError: OpenRLHF, or a chat template, would fail at a row.
    """
    prompts: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts += render_prompts([row], options, tokenizer)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, TemplateError) as error:
            form = "the chat template" if options["data.apply_chat_template"] else "openrlhf.data.input_template"
            raise RecipeError(
                f"{where}prompt {number} cannot be made by {form}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(prompts[-1], str):
            raise RecipeError(f"{where}prompt {number} is {prompts[-1]!r:.60}, but must be a text")
    return prompts


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
