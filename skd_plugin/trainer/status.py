"""How far a run is, in one small file of its folder: the launcher and the trainer write, the terminal reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Status:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "status.json"

    def read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def stage(self, name: str, **facts: Any) -> None:
        """Replaces the file in one move, so that a reader never finds half of it."""
        content = {**self.read(), "stage": name, **facts}
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps(content))
        os.replace(draft, self._path)
