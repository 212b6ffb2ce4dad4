"""Where the rows of a dataset's file are, and what is wrong in one that `datasets` has refused, or should have.

No second reader: nothing of what is parsed here is used. Arrow says of a damaged JSON file a row of a block at most.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skd_plugin.words import root_cause

# An escape like \ud800 without its other half, before or behind it.
LONE_SURROGATE = re.compile(
    rb"(?<!\\)(?:\\\\)*"
    rb"(\\u[dD][89abAB]\w\w(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]\w\w)\\u[dD][c-fC-F]\w\w)"
)


def why_not_read(path: Path, error: Exception) -> str:
    """In words, of what `datasets` raised of a file, a folder or a name on the Hub."""
    reason = root_cause(error)
    if isinstance(error, StopIteration) or "corresponds to no data" in reason:
        reason = "it holds no row"
    return (first_damage(path) if _is_json(path) else "") or reason


def bad_texts(path: Path, rows: Any) -> str:
    """Texts that are none, which `datasets` reads without a look: whoever comes to such a row ends there, or, where
    half a character is in a JSON array or in a column of several types, gets the text without it.

    Returns:
        What is wrong, in words; empty where nothing is.
    """
    import pyarrow as pa

    try:
        rows.with_format("arrow")[:].validate(full=True)
    except pa.ArrowInvalid as error:
        return why_not_read(path, error)
    loosely_read = _is_json(path) and (_is_array(path) or any(map(is_mixed, rows.features.values())))
    return lone_surrogate(path) if loosely_read else ""


def is_mixed(feature: Any) -> bool:
    """Whether a column of `datasets` holds values of several types."""
    return type(feature).__name__ == "Json"


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") and os.path.isfile(path)


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def lines_of_rows(path: Path) -> list[int]:
    """Number of the line of each row, from 1; empty where a row is not a line (a JSON array, another format)."""
    if not _is_json(path) or _is_array(path):
        return []
    with path.open("rb") as file:
        return [number for number, line in enumerate(file, start=1) if line.strip()]


def first_damage(path: Path) -> str:
    """In words, with its line; empty where nothing is found."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        return "the file is empty"
    damage = _of_array(content) if _is_array(path) else _of_lines(content)
    return next(damage, "") or lone_surrogate(path)


def lone_surrogate(path: Path) -> str:
    """Likewise, of texts that are none."""
    content = path.read_bytes()
    found = LONE_SURROGATE.search(content) if b"\\ud" in content or b"\\uD" in content else None
    if found is None:
        return ""
    line = content.count(b"\n", 0, found.start()) + 1
    return f"line {line} has {found[1].decode()} in it, half of a character (a lone surrogate), which is no text"


def _of_lines(content: bytes) -> Iterator[str]:
    lines = content.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode(), object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            yield f"line {number} is not JSON: {error.msg} (column {error.colno}); a line is one JSON object"
        except UnicodeDecodeError:
            yield f"line {number} is not UTF-8; save the file as UTF-8"
        except (ValueError, RecursionError) as error:
            yield f"line {number}: {error}"
        else:
            if not isinstance(values, dict):
                yield f"line {number} is {line.decode().strip():.40}, but a line is one JSON object"
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            yield f"line {number} is empty, which is not read where values of one column are of several types"


def _of_array(content: bytes) -> Iterator[str]:
    try:
        rows = json.loads(content.decode(), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        yield f"line {error.lineno} is not JSON: {error.msg} (column {error.colno})"
    except UnicodeDecodeError:
        yield "it is not UTF-8; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        yield str(error)
    else:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                yield f"row {number} is {json.dumps(row):.40}, but a row is one JSON object"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{max(names, key=names.count)}' is there twice")
    return found
