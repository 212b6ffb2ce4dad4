"""`skd eval`: an engine after the other answers the held-out prompts; then a table and eval.json."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from skd_plugin.adapters import whole
from skd_plugin.config.teacher import ONLY, teacher_words
from skd_plugin.engine.arguments import engine_for
from skd_plugin.evaluate.job import Answers, Job, read_answers
from skd_plugin.evaluate.plan import HeldOut, Plan, Student
from skd_plugin.evaluate.result import summarise
from skd_plugin.evaluate.result_table import WIDTH, tables
from skd_plugin.models import joined_ends_words, load_tokenizer
from skd_plugin.run.process import run_quietly
from skd_plugin.run_folder import Status, out_file, replace_text
from skd_plugin.terminal import plain_console, waiting
from skd_plugin.words import duration


class EvalError(Exception):
    """An engine ended with an error; the message names it and its log."""


def run_eval(plan: Plan, where: str, out: str) -> int:
    """Returns 0, 1 (an engine failed; the error is printed) or 130 (Ctrl-C)."""
    console = plain_console(width=max(plain_console().width, WIDTH))
    path = out_file(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for note in filter(None, (*plan.notes, plan.models.skd.rollout.notice)):
        console.print(f"Not measured: {note}" if note in plan.notes else note)
    folder = Path(tempfile.mkdtemp(prefix="skd-eval-"))
    try:
        answers = [_answers(plan, number, folder, console) for number in range(len(plan.students))]
    except EvalError as error:
        console.print(f"skd eval: {error}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written.")
        shutil.rmtree(folder)
        return 130
    shutil.rmtree(folder)
    result = summarise(plan, where, answers)
    replace_text(path, json.dumps(asdict(result), indent=1) + "\n")
    for table in tables(result):
        console.print(table)
    console.print(f"All figures are in {path}; docs/eval.md says what they are", soft_wrap=True)
    return 0


def _answers(plan: Plan, number: int, folder: Path, console: Console) -> list[Answers]:
    """What the engines of one student answered to each prompt."""
    student, prompts = plan.students[number], plan.held_out[number]
    first = next(iter(plan.models.skd.all_teachers))
    dtype = job_of(plan, student, prompts, first).spec.dtype
    model = whole(student.model, folder / f"student-{number + 1}", dtype)
    title = f"student {number + 1} of {len(plan.students)}, {student.name}"
    answers: list[Answers] = [{} for _ in prompts]

    def ask(kind: str, teacher: str, places: Sequence[int]) -> None:
        job = job_of(plan, student, [prompts[place] for place in places], teacher)
        job = replace(job, spec=replace(job.spec, student=model))
        if kind == "beside" and job.spec.end_ids:
            words = joined_ends_words(load_tokenizer(model, "student"), job.spec.end_ids)
            console.print(f"{title}: {words}", markup=False)
        who = "alone" if kind == "alone" else f"beside its {teacher_words(teacher)}"
        for place, found in zip(places, _run(kind, job, folder, console, title, who), strict=True):
            answers[place] = {**answers[place], **found}

    if "scores" in plan.measures:
        ask("alone", first, range(len(prompts)))
    for name in plan.teachers:
        places = [place for place, prompt in enumerate(prompts) if prompt.teacher == name]
        if places:
            ask("beside", name, places)
    return answers


def job_of(plan: Plan, student: Student, prompts: Sequence[HeldOut], teacher: str = ONLY) -> Job:
    """`teacher`: its name."""
    models = plan.models.of_teacher(teacher)
    spec = engine_for(models.skd, models.engine_options, student=student.model, cpu=models.cpu)
    return Job(
        # Of the teacher's distribution only what every trace has is looked at.
        spec=replace(
            spec,
            teacher_top_k=1,
            student_top_k=0,
            loss_temperature=1.0,
            teacher_hidden=False,
            joins_ends=spec.joins_ends and bool(plan.teachers),  # else a student stands in the teacher's place
        ),
        measures=list(plan.measures),
        prompts=[held_out.prompt for held_out in prompts],
        samples=plan.sampling.samples,
        temperature=plan.sampling.temperature,
        seed=models.skd.rollout.seed,
        rollout=models.skd.rollout.model_dump(),
    )


def _run(kind: str, job: Job, folder: Path, console: Console, title: str, who: str) -> list[Answers]:
    job.write(folder)
    Status(folder).stage("starting")  # that of the engine before is over
    log, started = folder / "engine.log", time.monotonic()
    with waiting(console, title) as tell:

        def look() -> None:
            stage = Status(folder).read().get("stage", "starting")
            tell(f"{title}: {stage} ({duration(time.monotonic() - started)})")

        error = run_quietly(["skd_plugin.evaluate.engine_process", kind, str(folder)], log, look)
    if error is not None:
        raise EvalError(f"{title}: {error}. The whole story is in {log}")
    console.print(f"{title}, {who}: {duration(time.monotonic() - started)}", soft_wrap=True)
    return read_answers(folder)
