"""A dataset file of the user's, line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skd_plugin.errors import RecipeError
from skd_plugin.prepare.rows import read_rows


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_know_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1}\n\n  \n{"a": 2, "b": null}\n{"a": 3}')
    assert read_rows(path, option="o", column="a") == [(1, {"a": 1}), (4, {"a": 2, "b": None}), (5, {"a": 3})]
    assert [row.line for row in read_rows(path, option="o", limit=4)] == [1, 4]


@pytest.mark.parametrize("mark", ["\u2028", "\x85"])
def test_a_line_ends_where_json_lines_say(tmp_path: Path, mark: str) -> None:
    """`str.splitlines` knows other ends of a line, which are text here."""
    line = json.dumps({"a": f"one{mark}two"}, ensure_ascii=False)
    assert mark in line
    assert read_rows(write(tmp_path, f"{line}\n{line}\n"), option="o") == [(n, {"a": f"one{mark}two"}) for n in (1, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2', r"own\.jsonl, line 2 is not JSON: .*; a line is one JSON object"),
        ('[\n{"a": 1},\n{"a": 2}\n]', r"own\.jsonl, line 1 is not JSON"),
        ('{"a": 1}\n\n["a"]', r"own\.jsonl, line 3: a line is one JSON object, but this is \["),
        ('{"a": 1}\n{"b": 1, "c": 2}', r"line 2 has no column 'a' \(openrlhf\.data\.input_key\); it has b, c"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_rows(write(tmp_path, text), option="o", column="a")


def test_a_missing_file_is_named_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"openrlhf\.data\.prompt_dataset: there is no file .*own\.jsonl"):
        read_rows(tmp_path / "own.jsonl", option="openrlhf.data.prompt_dataset")
