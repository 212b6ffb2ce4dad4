"""From what the engines answered to the content of eval.json. The fields' names and order are those of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skd_plugin.evaluate.estimates import LEVEL, RESAMPLES, Bootstrap, Estimate
from skd_plugin.evaluate.job import Answers
from skd_plugin.evaluate.plan import HeldOut, Plan
from skd_plugin.evaluate.values import Named, task_values

Tasks = dict[str, dict[str, Estimate]]  # task -> metric -> its estimate


@dataclass(frozen=True)
class Settings:
    samples: int
    k: tuple[int, ...]
    temperature: float
    measures: list[str]
    draft_len: int
    max_new_tokens: int | None
    seed: int
    level: float
    resamples: int


@dataclass(frozen=True)
class StudentResult:
    name: str
    model: str
    tasks: Tasks


@dataclass(frozen=True)
class Difference:
    student: str
    minus: str
    tasks: Tasks


@dataclass(frozen=True)
class Result:
    recipe: str
    teacher: str | dict[str, str] | None  # of several, by name
    settings: Settings
    students: list[StudentResult]
    differences: list[Difference]  # of every further student from the first one


def summarise(plan: Plan, where: str, answers: Sequence[Sequence[Answers]]) -> Result:
    """
    Args:
        where: what the person named, a recipe or a run.
        answers: to each prompt, of each student.
    """
    rollout, sampling = plan.models.skd.rollout, plan.sampling
    tasks: list[Tasks] = [{} for _ in plan.students]
    differences: list[Tasks] = [{} for _ in plan.students[1:]]
    for task in sorted({held_out.task for held_out in plan.held_out[0]}):
        values = [_values(plan, *one, task) for one in zip(plan.held_out, answers, strict=True)]
        count = sum(held_out.task == task for held_out in plan.held_out[0])
        bootstrap = Bootstrap(count, rollout.seed)
        for own, named in zip(tasks, values, strict=True):
            own[task] = {name: bootstrap.estimate(value) for name, value in named.items()}
        for own, named in zip(differences, values[1:], strict=True):
            shared = [name for name in named if name in values[0]]
            own[task] = {name: bootstrap.difference(named[name], values[0][name]) for name in shared}
    return Result(
        recipe=where,
        teacher=plan.teacher,
        settings=Settings(
            samples=sampling.samples,
            k=sampling.k,
            temperature=sampling.temperature,
            measures=list(plan.measures),
            draft_len=rollout.most_drafts,
            max_new_tokens=plan.models.max_new_tokens,
            seed=rollout.seed,
            level=LEVEL,
            resamples=RESAMPLES,
        ),
        students=[StudentResult(one.name, one.model, own) for one, own in zip(plan.students, tasks, strict=True)],
        differences=[
            Difference(student.name, plan.students[0].name, own)
            for student, own in zip(plan.students[1:], differences, strict=True)
        ],
    )


def _values(plan: Plan, prompts: Sequence[HeldOut], answers: Sequence[Answers], task: str) -> Named:
    own = [(prompt.label, answer) for prompt, answer in zip(prompts, answers, strict=True) if prompt.task == task]
    labels, of_task = [label for label, _ in own], [answer for _, answer in own]
    return task_values(of_task, labels, k=plan.sampling.k, draft_len=plan.models.skd.rollout.most_drafts)
