"""Where the rows of a JSON file are, and what is wrong in one that `datasets` has refused.

No second reader: nothing of what is parsed here is used. Arrow says of a damaged file a row of a block at most.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lines_of_rows(path: Path) -> list[int]:
    """Number of the line of each row, from 1; empty where a row is not a line (a JSON array)."""
    with path.open("rb") as file:
        if _is_array(file.read(100)):
            return []
        file.seek(0)
        return [number for number, line in enumerate(file, start=1) if line.strip()]


def first_damage(path: Path) -> str:
    """In words, with its line; empty where nothing is found."""
    content = path.read_bytes()
    if not content.strip():
        return "the file is empty"
    if _is_array(content[:100]):
        return next(_of_array(content), "")
    return next(_of_lines(content), "")


def _of_lines(content: bytes) -> Iterator[str]:
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
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
            elif not _is_unicode(values):
                yield f"line {number} has half of a character in it (a lone surrogate, \\ud800 to \\udfff)"


def _of_array(content: bytes) -> Iterator[str]:
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
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
            elif not _is_unicode(row):
                yield f"row {number} has half of a character in it (a lone surrogate, \\ud800 to \\udfff)"


def _is_array(start: bytes) -> bool:
    return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _is_unicode(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{max(names, key=names.count)}' is there twice")
    return found
