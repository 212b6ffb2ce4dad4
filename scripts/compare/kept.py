"""What was measured of a finished run, kept in its folder together with what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skd_plugin.run_folder import replace_text


def recall(path: Path, asked: Any) -> Any:
    """None where it was not measured, or something else was asked."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["found"] if known.get("asked") == asked else None


def keep(path: Path, asked: Any, found: Any) -> Any:
    replace_text(path, json.dumps({"asked": asked, "found": found}))
    return found
