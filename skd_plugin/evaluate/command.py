"""`skd eval`: an engine after the other answers the held-out prompts; then a table and eval.json."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from skd_plugin.engine.offline import recipe_arguments
from skd_plugin.errors import RecipeError
from skd_plugin.evaluate.answers import Job
from skd_plugin.evaluate.plan import BESIDE_THE_TEACHER, HeldOut, Plan, Student
from skd_plugin.evaluate.statistics import LEVEL, RESAMPLES, Bootstrap
from skd_plugin.evaluate.table import WIDTH, tables
from skd_plugin.evaluate.values import Named, of_prompts, task_values
from skd_plugin.run.process import run_quietly
from skd_plugin.run.progress import duration
from skd_plugin.run_folder import Status, replace_text


class EvalError(Exception):
    """An engine ended with an error; the message names it and its log."""


def run_eval(plan: Plan, where: str, out: str) -> int:
    """Returns 0, 1 (an engine failed; the error is printed) or 130 (Ctrl-C)."""
    console = Console(highlight=False, width=max(Console().width, WIDTH))
    path = Path(out)
    if path.is_dir():
        raise RecipeError(f"--out {out} is a folder; name a file")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for note in filter(None, (*plan.notes, plan.models.skd.rollout.notice)):
        console.print(f"Not measured: {note}" if note in plan.notes else note)
    folder = Path(tempfile.mkdtemp(prefix="skd-eval-"))
    try:
        found = [_answers(plan, number, folder, console) for number in range(len(plan.students))]
    except EvalError as error:
        console.print(f"skd eval: {error}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written.")
        shutil.rmtree(folder)
        return 130
    shutil.rmtree(folder)
    result = summarise(plan, where, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(result, indent=1) + "\n")
    for table in tables(result):
        console.print(table)
    console.print(f"All figures are in {path}; docs/eval.md says what they are", soft_wrap=True)
    return 0


def _answers(plan: Plan, number: int, folder: Path, console: Console) -> dict[str, Any]:
    """What the engines of one student answered, by measure."""
    student, prompts = plan.students[number], plan.held_out[number]
    title = f"student {number + 1} of {len(plan.students)}, {student.name}"
    found: dict[str, Any] = {}
    if "scores" in plan.measures:
        found["scores"] = _run("alone", job_of(plan, student, prompts), folder, console, title)
    if set(plan.measures) & set(BESIDE_THE_TEACHER):
        found |= _run("beside", job_of(plan, student, prompts), folder, console, title)
    return found


def job_of(plan: Plan, student: Student, prompts: HeldOut) -> Job:
    models = plan.models
    options = {**models.defaults, **models.given}
    return Job(
        student=student.model,
        teacher=plan.teacher,
        measures=list(plan.measures),
        prompt_ids=prompts.prompt_ids,
        limits=prompts.limits,
        top_k=prompts.top_k,
        references=prompts.references,
        samples=plan.sampling.samples,
        temperature=plan.sampling.temperature,
        seed=models.skd.rollout.seed,
        max_len=models.max_len,
        rollout=models.skd.rollout.model_dump(),
        vllm={**recipe_arguments(options, cpu=models.cpu), **models.skd.vllm},
    )


def _run(kind: str, job: Job, folder: Path, console: Console, title: str) -> dict[str, Any]:
    job.write(folder)
    Status(folder).stage("starting")  # that of the engine before is over
    log, started = folder / "engine.log", time.monotonic()
    with console.status(title) as spinner:

        def look() -> None:
            stage = Status(folder).read().get("stage", "starting")
            spinner.update(f"{title}: {stage} ({duration(time.monotonic() - started)})")

        error = run_quietly(["skd_plugin.evaluate.answers", kind, str(folder)], log, look)
    if error is not None:
        raise EvalError(f"{title}: {error}. The whole story is in {log}")
    who = "alone" if kind == "alone" else "beside its teacher"
    console.print(f"{title}, {who}: {duration(time.monotonic() - started)}", soft_wrap=True)
    return json.loads((folder / "found.json").read_text())


def summarise(plan: Plan, where: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of eval.json.

    Args:
        found: what the engines of each student answered.
    """
    tasks = sorted(set(plan.held_out[0].tasks))
    figures: dict[str, list[dict[str, Any]]] = {}
    differences: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        values = [_values(plan, number, found[number], task) for number in range(len(found))]
        count = plan.held_out[0].tasks.count(task)
        bootstrap = Bootstrap(count, plan.models.skd.rollout.seed)
        figures[task] = [_each(named, bootstrap.figure) for named in values]
        differences[task] = [
            {name: asdict(bootstrap.difference(named[name], values[0][name])) for name in named if name in values[0]}
            for named in values[1:]
        ]
    return {
        "recipe": where,
        "teacher": plan.teacher,
        "settings": {
            **asdict(plan.sampling),
            "measures": list(plan.measures),
            "draft_len": plan.models.skd.rollout.draft_len,
            "max_new_tokens": plan.models.max_new_tokens,
            "seed": plan.models.skd.rollout.seed,
            "level": LEVEL,
            "resamples": RESAMPLES,
        },
        "students": [
            {**asdict(student), "tasks": {task: figures[task][number] for task in tasks}}
            for number, student in enumerate(plan.students)
        ],
        "differences": [
            {
                "student": student.name,
                "minus": plan.students[0].name,
                "tasks": {task: differences[task][number] for task in tasks},
            }
            for number, student in enumerate(plan.students[1:])
        ],
    }


def _values(plan: Plan, number: int, found: dict[str, Any], task: str) -> Named:
    prompts = plan.held_out[number]
    places = [place for place, name in enumerate(prompts.tasks) if name == task]
    labels = [prompts.labels[place] for place in places]
    draft_len = plan.models.skd.rollout.draft_len
    return task_values(of_prompts(found, places), labels, k=plan.sampling.k, draft_len=draft_len)


def _each(named: Named, figure: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: asdict(figure(values)) for name, values in named.items()}
