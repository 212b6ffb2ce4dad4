"""How far a run is, in one small file of its folder: the launcher and the trainer write, the terminal reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Replaces a file in one move, so that a reader never finds half of it."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text)
    os.replace(draft, path)


class Status:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "status.json"

    def read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def stage(self, name: str, **facts: Any) -> None:
        kept = {key: value for key, value in self.read().items() if key != "error"}  # of an earlier attempt
        content = {**kept, "stage": name, **facts}
        replace_text(self._path, json.dumps(content))
