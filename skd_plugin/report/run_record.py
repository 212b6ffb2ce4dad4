"""A run folder as it lies on disk, possibly of a run that goes on or was cut off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skd_plugin.config.recipe import flatten
from skd_plugin.errors import RecipeError
from skd_plugin.run_folder import Record, RunFolder

Series = tuple[list[int], list[float]]  # steps, rising, and the values at them


@dataclass
class RunRecord:
    """What is known of a run from its folder."""

    folder: RunFolder
    name: str
    config: Record  # dotted name -> value; empty if there is no config.yaml
    status: Record
    curves: dict[str, Series]  # metric -> its series
    notes: list[str] = field(default_factory=list)  # what a reader of the page must know about the files

    def option(self, name: str) -> Any:
        return self.config.get(name)

    @property
    def steps(self) -> int:
        return max((steps[-1] for name, (steps, _) in self.curves.items() if not name.startswith("eval/")), default=0)


def read_runs(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Raises RecipeError: no such folder, not a run folder, or one that is named twice."""
    folders = [RunFolder(Path(path)) for path in paths]
    for index, folder in enumerate(folders):
        if not folder.path.exists():
            raise RecipeError(f"there is no run folder {folder.path}")
        written = folder.config, folder.metrics.path, folder.traces.path
        if not any(file.is_file() for file in written):
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
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: RunFolder, name: str) -> RunRecord:
    notes: list[str] = []
    config = _mapping(folder.config, notes)
    status = _mapping(folder.status.path, [])
    records = list(folder.metrics.scan(notes))
    if not folder.metrics.path.is_file():
        notes.append("There is no metrics.jsonl: no curves.")
    elif not records:
        notes.append("metrics.jsonl is empty: no step has ended yet.")
    if not folder.traces.path.is_file():
        notes.append("There is no traces.jsonl: no responses to look at (skd.traces_per_step).")
    return RunRecord(folder, name, flatten(config), status, _curves(records), notes)


def _mapping(path: Path, notes: list[str]) -> Record:
    """A YAML (or JSON) mapping, or {} and a note."""
    if not path.is_file():
        notes.append(f"There is no {path.name}: models and settings are unknown.")
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} cannot be read: models and settings are unknown.")
        return {}
    return content


def _curves(records: list[Record]) -> dict[str, Series]:
    """Every number of the records by metric. A step that was run again after a resume counts as it was last."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = float(value)
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in found.items()}
