"""The tasks of a recipe: checked, and their prompts, for the dataset files that OpenRLHF reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.run import PromptRow
from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.task import TaskConfig
from skd_plugin.config.teacher import ONLY
from skd_plugin.errors import RecipeError, unknown_key
from skd_plugin.host.prompts import PromptError, PromptForm
from skd_plugin.host.teacher_prompts import TeacherForm, teacher_prompt
from skd_plugin.prepare.prompts import check_lengths, check_references, make_prompts
from skd_plugin.run_folder import RunFolder
from skd_plugin.tasks import TASKS, Example, Task, TaskError, find_task, reward
from skd_plugin.tasks.label import Label, Sampling
from skd_plugin.tasks.mixing import parts, shares
from skd_plugin.tasks.reasoning_gym import EVALUATING, PREFIX, ReasoningGym

TASK_COLUMNS = {"data.input_key": "input", "data.label_key": "label"}


def longest_response(skd: SKDConfig, given: int | None) -> int | None:
    """Tokens, of the task that needs most; without tasks `given`, the run's own limit. None is what max_len leaves."""
    return max((_limit(config, given) for config in skd.all_tasks), default=given)


def _limit(config: TaskConfig, given: int | None) -> int:
    """A task's own limit, or else the run's, or else what its class says."""
    limits = config.max_new_tokens, given, _task_class(config).max_new_tokens
    return next(limit for limit in limits if limit is not None)


def task_options(skd: SKDConfig, host: HostOptions) -> dict[str, Any]:
    """OpenRLHF's data and reward options for tasks of ours. A reward of the user's own takes the checker's place."""
    for name in ("data.prompt_dataset", "eval.dataset"):
        if host.get(name):
            raise RecipeError(f"openrlhf.{name} is given, but skd.task makes the prompts; leave one of them out")
    folder = RunFolder(Path(skd.run_dir))
    options = {
        "data.prompt_dataset": str(folder.prompts("train").path),
        **TASK_COLUMNS,
    }
    reward_model = host.get("reward.model_name_or_path")
    if not reward_model and any(config.eval_prompts for config in skd.all_tasks):
        options["eval.dataset"] = str(folder.prompts("test").path)  # OpenRLHF evaluates by reward functions only
    if not reward_model and not host.get("train.agent_func_path"):  # an agent says what its response is worth
        options["reward.remote_url"] = host.get("reward.remote_url") or reward.__file__
    return options


def draw_prompts(
    skd: SKDConfig, form: PromptForm, tokenizer: Any, longest: int, given: int | None
) -> dict[str, list[PromptRow]]:
    """The tasks' prompts by split, after all of them have been found to fit.

    Args:
        longest: tokens of a prompt.
        given: the limit on a response that the recipe names for all tasks, if it does.
    """
    tasks = _tasks(skd)
    pool = [_draw(task, "train", c, c.train_prompts) for task, c in zip(tasks, skd.all_tasks, strict=True)]
    if skd.rollout.needs_references:
        for task, examples in zip(tasks, pool, strict=True):
            check_references((f"a prompt of task {task.name} ({e.prompt!r})", e.reference) for e in examples)
    train: list[PromptRow] = []
    counts = _mixture(skd, [len(examples) for examples in pool])
    for config, task, examples, count in zip(skd.all_tasks, tasks, pool, counts, strict=True):
        make = _row_maker(skd, config, task, form, tokenizer, given)
        train += map(make, islice(cycle(examples), count))
    drawn = {"train": train, "test": held_out(skd, form, tokenizer, given)}
    for rows in drawn.values():
        check_lengths(make_prompts(rows, form), form, tokenizer, longest)
    if len(tasks) > 1:  # OpenRLHF may read only the first (data.max_samples), which should not be of one task
        random.Random("skd.tasks").shuffle(train)
    return drawn


def held_out(skd: SKDConfig, form: PromptForm, tokenizer: Any, given: int | None) -> list[PromptRow]:
    """The tasks' held-out prompts, as rows of the dataset that OpenRLHF would read."""
    rows: list[PromptRow] = []
    for config, task in zip(skd.all_tasks, _tasks(skd), strict=True):
        examples = _draw(task, "test", config, config.eval_prompts)
        rows += map(_row_maker(skd, config, task, form, tokenizer, given), examples)
    return rows


def _sampling(skd: SKDConfig, config: TaskConfig, given: int | None) -> Sampling:
    """What a task has of its own beside others; a single task has the run's values."""
    limit = _limit(config, given)
    return Sampling(config.top_k, limit if limit != longest_response(skd, given) else None)


def _tasks(skd: SKDConfig) -> list[Task]:
    tasks = [make_task(config) for config in skd.all_tasks]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise RecipeError(f"skd.tasks: {max(names, key=names.count)} is there twice; its curves would be one")
    return tasks


def _mixture(skd: SKDConfig, available: list[int]) -> list[int]:
    """Training prompts of each task: as many together as there are; a task may repeat some, or leave some out."""
    if sum(available) == 0:
        raise RecipeError("skd.tasks: every train_prompts is 0; there is nothing to train on")
    weights = [c.weight if c.weight is not None else n for c, n in zip(skd.all_tasks, available, strict=True)]
    return parts(sum(available), shares(weights, skd.mix_temperature))


def _row_maker(
    skd: SKDConfig, config: TaskConfig, task: Task, form: PromptForm, tokenizer: Any, given: int | None
) -> Callable[[Example], PromptRow]:
    """How an example of a task becomes a row; the teacher's prompt is in it as the teacher reads it."""
    name = config.teacher or ONLY
    key, sampling = _key(config), _sampling(skd, config, given)
    own = _teacher_form(skd, config, form)

    def row(example: Example) -> PromptRow:
        label = Label(example.reference, key, example.label, tokenizer.eos_token, sampling).to_json()
        made: PromptRow = {"input": example.prompt, "label": label, "datasource": task.name}
        if name != ONLY:
            made["teacher"] = name
        if own is not None:
            try:
                prompt = own.prompt(made)
            except PromptError as error:
                raise RecipeError(f"a prompt of task {task.name} ({example.prompt!r:.60}): {error}") from error
            made["teacher_prompt"] = teacher_prompt(prompt) or prompt
        return made

    return row


def _teacher_form(skd: SKDConfig, config: TaskConfig, form: PromptForm) -> PromptForm | None:
    """With the teacher's prompts of this task; None where its teacher has none of its own."""
    name = config.teacher or ONLY
    ready = form.teachers[name]
    if ready is None:
        return None
    skd = skd.of_teacher(name)
    own, key, chat = skd.teacher_prompt(config), TASK_COLUMNS["data.input_key"], form.chat is not None
    teacher = TeacherForm.of(own, skd, key, ready.tokenizer, chat=chat) if own is not None else None
    return replace(form, teachers={ONLY: teacher}, name_key=None)


def _key(config: TaskConfig) -> str:
    """By which every process finds the task's class: its name, or the whole path of its file."""
    return str(Path(config.name).resolve()) if config.name.endswith(".py") else config.name


def _task_class(config: TaskConfig) -> type[Task]:
    if not config.name.endswith(".py") and not config.name.startswith(PREFIX) and config.name not in TASKS:
        raise RecipeError(
            f"skd.task.name: {unknown_key(config.name, TASKS)}; there are {', '.join(sorted(TASKS))}, "
            f"{PREFIX}DATASET, and a task file of your own"
        )
    try:
        return find_task(_key(config))
    except TaskError as error:
        raise RecipeError(f"skd.task.name: {error}") from error


def make_task(config: TaskConfig) -> Task:
    """The task, with the recipe's options of it."""
    kind = _task_class(config)
    for package in getattr(kind, "packages", ()):
        if find_spec(package) is None:
            raise RecipeError(
                f"task {kind.name} is scored by {package}, which is not installed; pip install 'skd_plugin[tasks]'"
            )
    evaluates = isinstance(kind, type) and issubclass(kind, ReasoningGym) and kind.dataset in EVALUATING
    if evaluates and not config.evaluating_checker:
        raise RecipeError(
            f"skd.task: the checker of {kind.name} evaluates what the student wrote as code. It does so in a process "
            "that reaches no file and no network (docs/tasks.md); set skd.task.evaluating_checker=true to take it, or "
            "another dataset"
        )
    given = {name: value for name in ("path", "template") if (value := getattr(config, name)) is not None}
    for name in given:
        if name not in getattr(kind, "options", ()):
            raise RecipeError(f"skd.task.{name} is for tasks that read a dataset, but {kind.name} makes its prompts")
    try:
        return kind(**given)
    except TaskError as error:
        raise RecipeError(f"skd.task: {error}") from error


def _draw(task: Task, split: str, config: TaskConfig, wanted: int | str) -> list[Example]:
    if wanted == 0:
        return []
    try:
        examples = task.examples(split, None if wanted == "full" else int(wanted), config.seed)
    except TaskError as error:
        raise RecipeError(f"skd.task: {error}") from error
    for number, example in enumerate(examples, start=1):
        for name, value in (("prompt", example.prompt), ("label", example.label), ("reference", example.reference)):
            if not isinstance(value, str) and (name, value) != ("reference", None):
                raise RecipeError(
                    f"skd.task: example {number} of {task.name}'s {split} split: its {name} is {value!r:.60}, but "
                    "must be a text"
                )
    return examples
