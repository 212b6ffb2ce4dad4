"""What is measured of whom; everything that can be wrong is found here, before an engine is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skd_plugin.config.recipe import load_recipe, override
from skd_plugin.config.run import Run
from skd_plugin.config.teacher import ONLY
from skd_plugin.errors import RecipeError
from skd_plugin.evaluate.job import Prompt
from skd_plugin.host.prompts import PromptForm
from skd_plugin.host.teacher_prompts import teacher_prompt
from skd_plugin.prepare.load_run import Models, complete_models, read_prompts
from skd_plugin.prepare.prompts import check_dataset, check_lengths, make_prompts
from skd_plugin.prepare.rows import check_column
from skd_plugin.prepare.task_prompts import held_out
from skd_plugin.prepare.teachers import named
from skd_plugin.run_folder import RunFolder
from skd_plugin.tasks.base import HELD_OUT
from skd_plugin.tasks.label import Label

MEASURES = ("scores", "distance", "prefixes", "speculation")
BESIDE_THE_TEACHER = MEASURES[1:]
DEFAULT_K = (1, 4, 16)
DEFAULT_SAMPLES = 16


@dataclass(frozen=True)
class Student:
    name: str  # what the person called it
    model: str  # a folder, or a name on the Hub


@dataclass(frozen=True)
class HeldOut:
    """A held-out prompt, and what a response to it is compared with."""

    prompt: Prompt
    label: Label
    task: str  # its name in the results
    teacher: str = ONLY  # its teacher's name


@dataclass(frozen=True)
class Sampling:
    samples: int  # a prompt
    k: tuple[int, ...]
    temperature: float


@dataclass(frozen=True)
class Plan:
    models: Models
    teachers: dict[str, str]  # models by name; empty where no measure needs one
    students: tuple[Student, ...]
    held_out: tuple[tuple[HeldOut, ...], ...]  # the prompts as each student reads them
    measures: tuple[str, ...]
    sampling: Sampling
    notes: tuple[str, ...]  # what is left out, and why

    @property
    def teacher(self) -> str | dict[str, str] | None:
        """The model; of several, by name; None where no measure needs one."""
        return (self.teachers.get(ONLY) or self.teachers) or None


def make_plan(
    where: str,
    overrides: Sequence[str],
    students: Sequence[str],
    measures: Sequence[str],
    samples: int = DEFAULT_SAMPLES,
    k: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> Plan:
    """
    Args:
        where: a recipe, or a run folder, whose students are the one before and the one after.
        students: models or run folders; none of them is the default of `where`.
        measures: of MEASURES; "all" is every one that the recipe has what it takes for.
        k: of pass@k; None is 1, 4 and 16, as far as the samples reach.

    Raises:
        RecipeError: what is wrong, what was expected, what to do.
    """
    sampling = _sampling(samples, k, temperature)
    content = _content(where, overrides)
    named = [student_of(name) for name in students]
    models, has_teacher = _models(content, named)
    found = tuple(named) or _default_students(where, models)
    if len({student.name for student in found}) < len(found):
        raise RecipeError("--student names one model twice; its difference to itself is 0")
    if models.given.get("train.agent_func_path"):
        raise RecipeError(
            "openrlhf.train.agent_func_path names an agent, but skd eval measures single responses; read eval/... in "
            "the run's metrics.jsonl, or give a recipe without the agent"
        )
    chosen, notes = _choose(measures, models, has_teacher)
    beside = bool(set(chosen) & set(BESIDE_THE_TEACHER))
    names = models.skd.all_teachers
    teachers = {name: one.model_name_or_path for name, one in names.items()} if beside else {}
    prompts = tuple(
        tuple(prompt for name in names for prompt in _held_out(models, name, student, beside=beside))
        for student in found
    )
    if not all(prompts):
        raise RecipeError("there are no held-out prompts: set skd.task.eval_prompts above 0")
    if "distance" in chosen and any(held_out.prompt.reference is None for held_out in prompts[0]):
        notes += ("distance along references: not every held-out prompt has one",)
    return Plan(models, teachers, found, prompts, chosen, sampling, notes)


def student_of(name: str) -> Student:
    """A model by its folder or its name on the Hub; of a run folder, the model that it ended with."""
    folder = RunFolder(Path(name))
    if not folder.config.is_file():
        return Student(name, name)
    if not (folder.model / "config.json").is_file():
        raise RecipeError(
            f"the run {name} has no model/: it has not come to its end; give its skd train command again"
        )
    return Student(name, str(folder.model))


def _content(where: str, overrides: Sequence[str]) -> dict[str, Any]:
    folder = RunFolder(Path(where))
    if not folder.path.is_dir():
        return load_recipe(where, overrides)
    if not folder.config.is_file():
        raise RecipeError(
            f"{where} is a folder without config.yaml, so it is no run; give a recipe, and a model as --student"
        )
    run = Run.load(folder)
    return override({"openrlhf": run.host, "skd": run.skd.model_dump()}, overrides, folder.config)


def _models(content: dict[str, Any], named: list[Student]) -> tuple[Models, bool]:
    """Whether there is a teacher, too; where there is none, a student stands in its place and nothing looks at it."""
    skd = content.get("skd") or {}
    has_teacher = bool(skd.get("teacher") or skd.get("teachers"))
    if not has_teacher:
        host = (content.get("openrlhf") or {}).get("actor") or {}
        name = named[0].model if named else host.get("model_name_or_path", "none")
        content = {**content, "skd": {**skd, "teacher": {"model_name_or_path": name}}}
    return complete_models(content), has_teacher


def _default_students(where: str, models: Models) -> tuple[Student, ...]:
    before = Student(models.student, models.student)
    return (before, student_of(where)) if Path(where).is_dir() else (before,)


def _sampling(samples: int, k: Sequence[int] | None, temperature: float) -> Sampling:
    if samples < 1:
        raise RecipeError(f"--samples is {samples}; at least one sampled response a prompt is needed")
    if temperature <= 0:
        raise RecipeError(
            f"--temperature is {temperature:g}; samples need one above 0, and greedy ones are always made"
        )
    wanted = tuple(sorted({n for n in DEFAULT_K if n <= samples} if k is None else set(k)))
    for n in wanted:
        if not 1 <= n <= samples:
            raise RecipeError(f"--k {n} is not within 1..{samples}: pass@k needs at least k samples (--samples)")
    return Sampling(samples, wanted, temperature)


def _choose(measures: Sequence[str], models: Models, has_teacher: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The measures, and why the others are left out.

    Raises:
        RecipeError: one that was asked for by its name cannot be made.
    """
    unknown = [name for name in measures if name not in (*MEASURES, "all")]
    if unknown:
        raise RecipeError(f"--measure {unknown[0]}: there are all, {', '.join(MEASURES)}")
    lacking = {} if has_teacher else dict.fromkeys(BESIDE_THE_TEACHER, "the recipe names no skd.teacher")
    if has_teacher and models.skd.is_served:
        lacking = dict.fromkeys(BESIDE_THE_TEACHER, "the teacher is elsewhere (skd.teacher.url)")
    if not models.skd.all_tasks:
        lacking.setdefault("prefixes", "the recipe has no skd.task, so nothing says what a continuation is worth")
    for name in measures:
        if name in lacking:
            raise RecipeError(f"--measure {name}: {lacking[name]}")
    wanted = MEASURES if "all" in measures else measures
    chosen = tuple(name for name in MEASURES if name in wanted and name not in lacking)
    return chosen, tuple(f"{name}: {lacking[name]}" for name in wanted if name in lacking)


def _held_out(recipe: Models, name: str, student: Student, *, beside: bool) -> tuple[HeldOut, ...]:
    """Of the teacher of this name. `beside`: as it reads them, too."""
    models = recipe.of_teacher(name)
    with named(name):
        tokenizer = models.tokenizer_of(
            models.skd.the_teacher.model_name_or_path if beside else student.model, student.model
        )
    options = models.row_options
    form = PromptForm.of(options, tokenizer, models.skd, paired=beside)
    label, column = options["data.label_key"], recipe.skd.teacher_column
    rows = _rows(models, form, tokenizer, column)
    rows = [row for row in rows if column is None or row[column] == name]
    if not rows:
        return ()
    prompts = make_prompts(rows, form)
    check_lengths(prompts, form, tokenizer, models.longest_prompt)
    ids = tokenizer(list(map(str, prompts)), add_special_tokens=False).input_ids
    own: list[list[int] | None] = [None] * len(ids)
    if form.teacher is not None:
        texts = [teacher_prompt(prompt) or str(prompt) for prompt in prompts]
        own = form.teacher.tokenizer(texts, add_special_tokens=False).input_ids
    return tuple(
        replace(
            _prompt(prompt, teachers, Label.parse(row.get(label)), str(row.get("datasource") or HELD_OUT), models),
            teacher=name,
        )
        for prompt, teachers, row in zip(ids, own, rows, strict=True)
    )


def _prompt(ids: list[int], teacher_ids: list[int] | None, label: Label, task: str, models: Models) -> HeldOut:
    longest = label.sampling.max_new_tokens or models.max_new_tokens or models.max_len
    limit = min(longest, models.room_behind(ids, teacher_ids))
    return HeldOut(Prompt(ids, limit, label.sampling.top_k, label.reference, teacher_ids), label, task)


def _rows(models: Models, form: PromptForm, tokenizer: Any, column: str | None) -> Sequence[Mapping[str, Any]]:
    """Of the held-out prompts: those of the tasks, or of a dataset of the user's own, whose `column` names teachers
    where there are several.
    """
    if models.skd.all_tasks:
        return held_out(models.skd, form, tokenizer, models.given_limit)
    options = models.options
    if not options["eval.dataset"]:
        raise RecipeError("there are no held-out prompts: give the recipe a skd.task, or openrlhf.eval.dataset")
    dataset = read_prompts("eval.dataset", options)
    if column is not None:
        check_column(dataset.whole, column, "skd.teacher_column")
        form = replace(form, teachers={ONLY: None})  # not every row is this teacher's
    check_dataset(dataset, form, options["data.label_key"], tokenizer, models.longest_prompt)
    return list(dataset.whole.rows)
