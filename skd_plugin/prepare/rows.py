"""The one reader of datasets: what OpenRLHF loads is loaded, and what it refuses is refused in words.

Rows are a `datasets.Dataset`, in Arrow's memory: a million of them are read once, and looked at by columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from skd_plugin.damage import bad_texts, is_mixed, lines_of_rows, why_not_read
from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import load_rows

FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")  # to OpenRLHF's `blending_datasets` one file
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Source:
    """A dataset that a recipe names."""

    name: str
    rows: Any  # datasets.Dataset

    def where(self, index: int) -> str:
        """What a person calls a row, counted from 0: its line, where a line is a row."""
        if len(self._lines) > index:
            return f"{self.name}, line {self._lines[index]}"
        return f"{self.name}, row {index + 1}"

    @cached_property
    def _lines(self) -> list[int]:
        return lines_of_rows(Path(_path(self.name)))


class Dataset(NamedTuple):
    sources: list[Source]
    whole: Source  # all of them, as OpenRLHF puts them together
    there_are: int  # rows, had there been no limit


def read_dataset(
    names: str, *, option: str, split: str, limit: int, probs: str | None = None, seed: int = 42
) -> Dataset:
    """
    Args:
        names: files, folders, names on the Hub, with commas in between.
        option: that names them, for the error.
        limit: rows that are taken of each, and of all together.
        probs: as OpenRLHF's data.prompt_probs.

    Raises:
        RecipeError: one of them cannot be read, or they do not go together.
    """
    parts = [name.strip() for name in names.split(",")]
    if not all(parts):
        raise RecipeError(f"{option} is {names!r:.200}, in which a name is empty; give names with commas in between")
    if probs is not None:
        _check_probs(probs, len(parts))
    for name in parts:
        _check_there(name, option)
    everything = [_read(name, option=option, split=split, limit=sys.maxsize) for name in parts]
    sources = [Source(name, _first(limit, rows)) for name, rows in zip(parts, everything, strict=True)]
    for source in sources:
        if found := bad_texts(Path(_path(source.name)), source.rows):
            raise RecipeError(f"{option}: {source.name} cannot be read: {found}")
    there_are = sum(map(len, everything))
    if len(parts) == 1:
        return Dataset(sources, sources[0], there_are)
    rows = _read(names, option=option, split=split, limit=limit, probs=probs, seed=seed)
    return Dataset(sources, Source(names, _first(limit, rows)), max(there_are, len(rows)))


def _first(limit: int, rows: Any) -> Any:
    return rows.select(range(min(limit, len(rows))))


def check_column(source: Source, name: str, option: str) -> None:
    """Raises RecipeError: the dataset has none of this name, which `option` gives."""
    if name not in source.rows.column_names:
        raise RecipeError(
            f"{source.name} has no column '{name}' ({option}); it has {', '.join(source.rows.column_names)}"
        )


def column(rows: Any, name: str) -> Any:
    """A column as Arrow holds it."""
    return rows.select_columns([name]).with_format("arrow")[:].column(0)


def values(rows: Any, name: str) -> Iterator[Any]:
    """Of a column, one after the other."""
    for part in rows.select_columns([name]).iter(ROWS_AT_ONCE):
        yield from part[name]


def is_text(rows: Any, name: str) -> bool:
    """Whether a column holds texts and nulls alone, by its type."""
    return getattr(rows.features[name], "dtype", None) in ("string", "large_string")


def mixed(rows: Any, name: str) -> str:
    """What must be known of a column's values where they are of several types; empty where they are not."""
    if not is_mixed(rows.features[name]):
        return ""
    return (
        f"; texts of '{name}' stand beside other values, and `datasets` then takes every text for JSON, if it is some"
    )


def task_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of the rows that tasks have made."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def content_digest(datasets: Sequence[Dataset], names: Sequence[str], beside: str = "") -> str:
    """SHA-256 of the columns of these names, wherever the rows come from: a second or less for a million rows.

    Args:
        beside: what else makes prompts of them.
    """
    digest = hashlib.sha256(beside.encode())
    for dataset in datasets:
        for source in dataset.sources:
            for part in _in_bytes(source.rows, [name for name in names if name in source.rows.column_names]):
                digest.update(part)
    return digest.hexdigest()


def _in_bytes(rows: Any, names: list[str]) -> Iterator[Any]:
    """Independent of how the rows are cut into pieces in Arrow's memory."""
    import pyarrow as pa

    yield repr(names).encode()
    for table in rows.select_columns(names).with_format("arrow").iter(ROWS_AT_ONCE):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.combine_chunks().replace_schema_metadata(None))
        yield sink.getvalue()


def _check_there(name: str, option: str) -> None:
    """Raises RecipeError for a path where nothing is, for which `datasets` would ask the Hub."""
    path = _path(name)
    if "://" in path or set("*?[") & set(path):  # addresses and patterns, which `datasets` follows
        return
    if os.path.splitext(path)[1] in FILES and not os.path.isfile(path):
        raise RecipeError(f"{option}: there is no file {path}")
    if path.startswith(("/", ".", "~")) and not os.path.exists(path):
        raise RecipeError(f"{option}: there is no file {path}, nor a folder")


def _read(name: str, *, option: str, split: str, **how: Any) -> Any:
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would say of an error is in ours
    try:
        return load_rows(name, split=split, **how)
    except Exception as error:  # of the Hub, `datasets`, Arrow, pandas: whatever it is, there are no rows
        raise RecipeError(f"{option}: {name} cannot be read: {_reason(name, split, error)}") from error


def _reason(name: str, split: str, error: Exception) -> str:
    if isinstance(error, AttributeError) and "DatasetDict" in str(error):
        return f"it has no split '{split}' (openrlhf.data.prompt_split, openrlhf.eval.split)"
    return why_not_read(Path(_path(name)), error)


def _check_probs(probs: str, number: int) -> None:
    """Raises RecipeError for what OpenRLHF would fail at, or, with a 0, never come to an end of."""
    try:
        values = [float(value) for value in str(probs).split(",")]
    except ValueError:
        values = []
    if len(values) != number or not all(0 < value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise RecipeError(
            f"openrlhf.data.prompt_probs is {str(probs)!r:.100}, but must be {number} numbers above 0 with commas in "
            "between, one for each dataset, and 1 together"
        )


def _path(name: str) -> str:
    """OpenRLHF takes what follows an @ for a folder of the dataset."""
    return name.split("@")[0].strip()
