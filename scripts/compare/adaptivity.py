"""Acceptance on the same prompts over training: each checkpoint of a run samples for them once more."""

from __future__ import annotations

import re
from pathlib import Path

from collect import Row
from held_out import HeldOut
from kept import keep, recall
from plan import Plan, Run

from skd_plugin.run_folder import RunFolder


def measure_adaptivity(plan: Plan, folder: Path) -> list[Row]:
    if plan.adaptivity is None:
        return []
    runs = [plan.run(cell, plan.adaptivity.method, plan.seeds[0]) for cell in plan.adaptivity.cells]
    finished = [run for run in runs if RunFolder(folder / run.name).model.is_dir()]
    return [row for run in finished for row in _kept(run, folder / run.name, plan.adaptivity.prompts)]


def _kept(run: Run, folder: Path, count: int) -> list[Row]:
    path, asked = folder / "adaptivity.json", {"prompts": count}
    return recall(path, asked) or keep(path, asked, _of_run(run, folder, count))


def _of_run(run: Run, folder: Path, count: int) -> list[Row]:
    from skd_plugin.engine.sampling_rule import SamplingRule

    held_out = HeldOut(folder)
    settings = SamplingRule.of(held_out.rollout).settings
    rows = []
    for step, path in [(0, held_out.first_student), *_checkpoints(folder)]:
        held_out.put(path)
        metrics = held_out.metrics(settings, count, run.seed)
        rows.append(
            {
                "task": run.task,
                "start": run.start,
                "step": step,
                "accepted": metrics["skd/accept_rate"],
                "kl": metrics["skd/kl"],
                "tokens": metrics["tokens"],
            }
        )
    return rows


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(re.search(r"(\d+)_hf$", path.name)[1]), path) for path in folder.glob("**/*[0-9]_hf")]
    return sorted(found)
