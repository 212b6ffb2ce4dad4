"""What else the finished students of a plan can do: draft for their teacher, and a harder task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collect import Row
from held_out import HeldOut
from kept import keep, recall
from plan import Finished, Plan, Run

from skd_plugin.run_folder import RunFolder

START, TEACHER = "student at the start", "the teacher"  # stand where a method does; none has such a name


def measure_finished(plan: Plan, folder: Path) -> list[Row]:
    """A row a finished run, and one each for the student and the teacher that the runs of a cell began with."""
    part = plan.finished
    return [] if part is None else [row for cell in part.cells for row in _of_cell(plan, cell, part, folder)]


def _of_cell(plan: Plan, cell: str, part: Finished, folder: Path) -> list[Row]:
    """Measured once, and kept in the run's folder; one engine for all that is not there yet."""
    runs = [plan.run(cell, method, seed) for seed in plan.seeds for method in plan.comparison.methods]
    runs = [run for run in runs if RunFolder(folder / run.name).model.is_dir()]
    asked = [(run, run.method) for run in runs] + [(run, who) for run in runs[:1] for who in (START, TEACHER)]
    rows, engine, wanted = [], None, part.model_dump(mode="json")
    for run, who in asked:
        path = folder / run.name / f"finished-{who.replace(' ', '-')}.json"
        figures = recall(path, wanted)
        if figures is None:
            engine = engine or HeldOut(folder / run.name, part.draft_len)
            figures = keep(path, wanted, _measure(engine, run, who, part, folder))
        rows.append({"task": run.task, "start": run.start, "method": who, "seed": run.seed, **figures})
    return rows


def _measure(held_out: HeldOut, run: Run, who: str, part: Finished, folder: Path) -> dict[str, Any]:
    student = held_out.first_student if who in (START, TEACHER) else RunFolder(folder / run.name).model
    held_out.put(student)
    figures = dict.fromkeys(("accepted", "tokens_a_block")) if who == TEACHER else speculative(held_out, run, part)
    if part.harder is not None:
        figures["harder"] = held_out.score(str(part.harder), part.prompts, run.seed, by_teacher=who == TEACHER)
    return figures


def speculative(held_out: HeldOut, run: Run, part: Finished) -> dict[str, Any]:
    """Speculative decoding at temperature 1 (arXiv 2211.17192), whose text is the teacher's alone.

    Our engine's `interpolated` at 1 is its test for each proposal. It emits no token behind a block that is wholly
    kept, as plain speculative decoding does, so a block of that emits what is kept here and one more.
    """
    from skd_plugin.core.sampling import SamplingSettings

    settings = SamplingSettings(top_k=0, gate="interpolated", threshold=1.0)
    metrics = held_out.metrics(settings, part.prompts, run.seed)
    drafted = metrics["tokens"] * (1 - metrics["skd/undrafted_frac"])
    blocks = drafted / (1 - metrics["skd/draft_waste"]) / part.draft_len
    kept = metrics["skd/accept_rate"] * drafted
    return {"accepted": metrics["skd/accept_rate"], "tokens_a_block": 1 + kept / blocks}
