"""A run folder as it lies on disk, possibly of a run that goes on or was cut off, or with files that somebody edited.

What is read here is made of clean values: everything after it need not ask again. What is not, is left out, and a note
says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from skd_plugin.config import yaml_text
from skd_plugin.config.recipe import flatten
from skd_plugin.errors import RecipeError
from skd_plugin.report.values import LAST_STEP, clean, drawable, is_whole, short
from skd_plugin.run_folder import LeftOut, Record, RunFolder

Series = tuple[list[int], list[float]]  # steps, rising, and the values at them, finite; at least one
Option = str | int | float | bool | None  # a list is its text


@dataclass
class RunRecord:
    """What is known of a run from its folder."""

    folder: RunFolder
    name: str
    config: dict[str, Option]  # by dotted name; empty if there is no config.yaml
    stage: str | None  # where the run is, or was when it ended
    planned_steps: int | None
    curves: dict[str, Series]  # metric -> its series
    notes: list[str] = field(default_factory=list)  # what a reader of the page must know about the files

    def option(self, name: str) -> Option:
        return self.config.get(name)

    def text(self, name: str) -> str | None:
        """The option as text; None where it is not set."""
        value = self.option(name)
        return None if value is None else str(value)

    @property
    def steps(self) -> int:
        return max((steps[-1] for name, (steps, _) in self.curves.items() if not name.startswith("eval/")), default=0)


def read_runs(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Raises RecipeError: no such folder, not a run folder, or one that is named twice."""
    folders = [RunFolder(Path(path)) for path in paths]
    for index, folder in enumerate(folders):
        if not os.path.exists(folder.path):  # False for a name that no file can have, too
            raise RecipeError(f"there is no run folder {folder.path}")
        written = folder.config, folder.metrics.path, folder.traces.path
        if not any(os.path.isfile(file) for file in written):
            raise RecipeError(
                f"{folder.path} is not a run folder: it holds none of {', '.join(file.name for file in written)}. "
                "Name the folder that skd train wrote (skd.run_dir)"
            )
        if folder.path.resolve() in [other.path.resolve() for other in folders[:index]]:
            raise RecipeError(f"{folder.path} is named twice")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: list[RunFolder]) -> list[str]:
    """Short names that tell the folders apart: as many trailing parts of the paths as that takes."""
    parts = [folder.path.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = [clean("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: RunFolder, name: str) -> RunRecord:
    notes: list[str] = []
    config = _config(folder.config, notes)
    stage, planned_steps = _status(folder.status.path, notes)
    left_out = LeftOut(folder.metrics.path.name)
    curves = _curves(folder.metrics.scan(left_out), left_out)
    if _is_file(folder.metrics.path, "no curves", notes) and not curves:
        notes.append(
            "metrics.jsonl is empty: no step has ended yet."
            if not folder.metrics.path.stat().st_size
            else "metrics.jsonl holds nothing that can be shown: no curves."
        )
    notes += left_out.notes()
    _is_file(folder.traces.path, "no responses to look at (skd.traces_per_step)", notes)
    return RunRecord(folder, name, config, stage, planned_steps, curves, notes)


def _is_file(path: Path, without: str, notes: list[str]) -> bool:
    """Whether there is such a file; adds a note where not. Args: without: what a page then lacks."""
    if not path.is_file():
        fault = f"{path.name} is no file" if path.exists() else f"There is no {path.name}"
        notes.append(f"{fault}: {without}.")
    return path.is_file()


def _config(path: Path, notes: list[str]) -> dict[str, Option]:
    if not _is_file(path, "models and settings are unknown", notes):
        return {}
    fault = "it is no mapping of options"
    try:
        content = yaml_text.parse(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {key: _option(value) for key, value in flatten(content).items()}
    except UnicodeDecodeError as error:
        fault = f"it is not text in UTF-8 (byte {error.start + 1})"
    except yaml_text.YamlError as error:
        fault = str(error)
    except OSError as error:
        fault = error.strerror or type(error).__name__
    notes.append(f"config.yaml cannot be read: {clean(fault)}. Models and settings are unknown.")
    return {}


def _option(value: object) -> Option:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _status(path: Path, notes: list[str]) -> tuple[str | None, int | None]:
    """Stage and planned steps, None where they are unknown. A folder without the file needs no note: the page says
    that the stage is unknown."""
    if not path.exists():
        return None, None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append("status.json cannot be read: how far the run is, is unknown.")
        return None, None
    stage, planned = content.get("stage"), content.get("planned_steps")
    if stage is not None and not isinstance(stage, str):
        notes.append("status.json: the stage is no text, and left out.")
        stage = None
    if planned is not None and not is_whole(planned, 0, LAST_STEP):
        notes.append("status.json: planned_steps is no number of steps, and left out.")
        planned = None
    return None if stage is None else clean(stage), planned


def _curves(records: Iterable[tuple[int, Record]], left_out: LeftOut) -> dict[str, Series]:
    """Every number of the records by metric. A step that was run again after a resume counts as it was last."""
    found: dict[str, dict[int, float]] = {}
    for line, record in records:
        step = record.pop("step", None)
        if not is_whole(step, 0, LAST_STEP):
            left_out.add("record", f"step is no whole number from 0 to {LAST_STEP:,}", line)
            continue
        for name, value in record.items():
            if value is None:  # a value that did not exist at this step
                continue
            name, number = clean(name), drawable(value)
            if number is None:
                left_out.add("value", f"{short(name)} is not a number that can be drawn", line)
            else:
                found.setdefault(name, {})[step] = number
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in found.items()}
