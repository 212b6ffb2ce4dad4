"""A recipe made ready to start: typed, completed, checked, and written down in its run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from skd_plugin.config import host_rules
from skd_plugin.config.host_options import check_by_host, host_arguments, host_parser
from skd_plugin.config.movable import VALUE_FORMS, extremes
from skd_plugin.config.recipe import flatten, load_recipe
from skd_plugin.config.schema import SKDConfig, field_docs
from skd_plugin.config.versions import check_versions
from skd_plugin.errors import RecipeError, unknown_key
from skd_plugin.prepare.models import check_output_head, check_pair, check_prompts, host_prompts
from skd_plugin.prepare.prompts import longest_response, task_options, write_tasks
from skd_plugin.run_folder import RunFolder

PROMPTS_CHECKED = 20_000  # of a dataset; a generated task is checked whole


@dataclass(frozen=True)
class Run:
    skd: SKDConfig
    host: dict[str, Any]  # dotted OpenRLHF options, complete
    cpu: bool

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.skd.run_dir))

    def host_argv(self) -> list[str]:
        return host_arguments(self.host, host_parser())

    def flat_options(self) -> dict[str, Any]:
        """Every option of the run by its full dotted name."""
        ours = flatten(self.skd.model_dump(), "skd.")
        return {**ours, **{f"openrlhf.{key}": value for key, value in self.host.items()}}

    def save(self) -> None:
        """Writes config.yaml; `Run.load` reads it back in the process that starts the host."""
        self.folder.write_config({"openrlhf": self.host, "skd": self.skd.model_dump(), "cpu": self.cpu})

    @classmethod
    def load(cls, folder: RunFolder) -> Run:
        content = folder.read_config()
        return cls(SKDConfig(**content["skd"]), content["openrlhf"], content["cpu"])


@dataclass(frozen=True)
class Models:
    """The part of a recipe that any use of it needs: the two models, and the engine's sizes."""

    skd: SKDConfig
    given: dict[str, Any]  # dotted OpenRLHF options of the recipe, with the defaults of a distillation run
    defaults: dict[str, Any]  # the host's own
    cpu: bool

    @property
    def student(self) -> str:
        """Raises RecipeError where the recipe names none."""
        if not self.given.get("actor.model_name_or_path"):
            raise RecipeError("openrlhf.actor.model_name_or_path is missing: the student, a folder or a model name")
        return self.given["actor.model_name_or_path"]

    @property
    def max_len(self) -> int:
        return self.given.get("data.max_len", self.defaults["data.max_len"])

    @property
    def max_new_tokens(self) -> int | None:
        """Of the task that needs most, or without tasks of the run; None is whatever max_len leaves."""
        return longest_response(self.skd, self.given_limit)

    @property
    def given_limit(self) -> int | None:
        """The limit on a response that the recipe names: ours, or else the host's."""
        own = self.skd.rollout.max_new_tokens
        return self.given.get("rollout.max_new_tokens") if own is None else own

    def tokenizer_of(self, teacher: str, student: str) -> Any:
        """The student's, after both models have been found to fit each other and the recipe.

        Raises:
            RecipeError: they do not.
        """
        return check_pair(
            teacher,
            student,
            top_k=int(max([*extremes(self.skd.rollout.top_k), *(task.top_k or 1 for task in self.skd.all_tasks)])),
            loss_top_k=self.skd.loss.top_k,
            max_len=self.max_len,
            draft_len=self.skd.rollout.draft_len,
        )

    @cached_property
    def tokenizer(self) -> Any:
        return self.tokenizer_of(self.skd.teacher.model_name_or_path, self.student)


def load_models(recipe: str | Path, overrides: Iterable[str] = ()) -> Models:
    """Reads a recipe and checks its two models; enough for sampling, where there is nothing to train.

    Raises:
        RecipeError: what is wrong, what was expected, what to do.
    """
    models = complete_models(load_recipe(recipe, overrides))
    _ = models.tokenizer  # made here, so that what is wrong is found here
    return models


def complete_models(content: dict[str, Any]) -> Models:
    """The two sections of a recipe, typed and completed; no model is looked at.

    Raises:
        RecipeError: an option is wrong.
    """
    check_versions()
    skd = parse_skd(content.get("skd") or {})
    skd = skd.model_copy(update={"run_dir": str(Path(skd.run_dir).resolve())})
    cpu, parser = _on_cpu(skd), host_parser()
    given = host_rules.complete(content.get("openrlhf") or {}, cpu=cpu)
    host_arguments(given, parser)
    defaults = {action.dest: action.default for action in parser._actions if action.option_strings}
    return Models(skd, given, defaults, cpu)


def load_run(recipe: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Everything that can be wrong in a recipe is found here, before Ray, vLLM or DeepSpeed is started.

    Raises:
        RecipeError: what is wrong, what was expected, what to do.
    """
    models = load_models(recipe, overrides)
    skd = models.skd
    host = models.given | _run_folder_options(skd)
    host["rollout.max_new_tokens"] = models.max_new_tokens
    if skd.all_tasks:
        host |= task_options(skd, host)
    _default_reward(host)
    complete = {**models.defaults, **host}
    host_rules.check(complete, uses_rewards=skd.objective.uses_rewards)
    if skd.objective.uses_rewards:
        host_rules.check_rewards(complete, teacher_advantage=skd.objective.teacher_advantage)
    if skd.rollout.needs_references:
        host_rules.check_references(complete, method=skd.rollout.method)
    check_by_host(host_arguments(host, host_parser()))
    if skd.loss.vocabulary == "full":
        host_rules.check_full_vocabulary(complete)
        check_output_head(skd.teacher.model_name_or_path, "teacher")
        check_output_head(models.student, "student")
    _check_chat_template(complete, models.tokenizer)
    if not skd.all_tasks:
        _check_dataset(complete, models.tokenizer, needs_references=skd.rollout.needs_references)
    else:
        longest_prompt = models.max_len - (models.max_new_tokens or 1)
        count = write_tasks(skd, complete, models.tokenizer, longest_prompt, models.given_limit)
        if count < complete["rollout.batch_size"]:
            raise RecipeError(_too_few_prompts(count, complete))
    return Run(skd, host, models.cpu)


def _default_reward(host: dict[str, Any]) -> None:
    """Without this name, and without rewards of the user's, the host would start a reward model."""
    if not any(host.get(name) for name in ("reward.model_name_or_path", "train.agent_func_path")):
        host.setdefault("reward.remote_url", host_rules.NO_REWARD)


def parse_skd(section: dict[str, Any]) -> SKDConfig:
    try:
        return SKDConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("skd", *(str(part) for part in first["loc"] if part not in VALUE_FORMS)))
        if first["type"] == "extra_forbidden":
            raise RecipeError(unknown_key(key, field_docs())) from error
        if first["type"] == "value_error":  # a check of ours between two options
            raise RecipeError(f"{key}: {first['ctx']['error']}") from error
        got = "" if first["type"] == "missing" else f"; got {first['input']!r}"
        raise RecipeError(f"{key}: {first['msg'].lower()}{got}") from error


def _on_cpu(skd: SKDConfig) -> bool:
    import torch

    if skd.device == "auto":
        return not torch.cuda.is_available()
    if skd.device == "cuda" and not torch.cuda.is_available() and "RAY_ADDRESS" not in os.environ:
        raise RecipeError(
            "the recipe wants CUDA (skd.device: cuda), but this machine has no GPU and RAY_ADDRESS names no cluster; "
            "run it on a GPU node, or set skd.device=cpu"
        )
    return skd.device == "cpu"


def _run_folder_options(skd: SKDConfig) -> dict[str, Any]:
    folder = RunFolder(Path(skd.run_dir))
    return {
        "ckpt.output_dir": str(folder.model),
        "ckpt.path": str(folder.checkpoints),
        "logger.tensorboard_dir": str(folder.events.parent),
        "logger.wandb.run_name": folder.events.name,  # so the host names the folder of its events
    }


def _too_few_prompts(count: int, options: dict[str, Any]) -> str:
    return (
        f"there are {count} prompts, but a step needs openrlhf.rollout.batch_size = {options['rollout.batch_size']}; "
        "give more prompts or make the batch smaller"
    )


def _check_chat_template(options: dict[str, Any], tokenizer: Any) -> None:
    if options["data.apply_chat_template"] and not tokenizer.chat_template:
        raise RecipeError(
            "openrlhf.data.apply_chat_template is true, but the student's tokenizer has no chat template; set it to "
            "false, or give openrlhf.data.input_template"
        )


def _check_dataset(options: dict[str, Any], tokenizer: Any, *, needs_references: bool) -> None:
    """Prompt lengths of a local dataset, made the way the host makes its prompts."""
    path = Path(str(options["data.prompt_dataset"]))
    if path.suffix not in (".json", ".jsonl"):
        return  # a hub name or another format: the host loads it
    if not path.is_file():
        raise RecipeError(f"openrlhf.data.prompt_dataset: there is no file {path}")
    key = options["data.input_key"]
    rows = [json.loads(line) for line in path.read_text().splitlines()[:PROMPTS_CHECKED] if line.strip()]
    if len(rows) < options["rollout.batch_size"]:
        raise RecipeError(f"{path}: {_too_few_prompts(len(rows), options)}")
    for number, row in enumerate(rows, start=1):
        if key not in row:
            where = "" if number == 1 else f" in row {number}"
            raise RecipeError(
                f"{path} has no column '{key}'{where} (openrlhf.data.input_key); it has {', '.join(row)}"
            )
    prompts = host_prompts(rows, options, tokenizer)
    if needs_references:
        _check_references(rows, options["data.label_key"], path)
    check_prompts(prompts, tokenizer, options["data.max_len"] - (options["rollout.max_new_tokens"] or 1))


def _check_references(rows: list[dict[str, Any]], label_key: str, path: Path) -> None:
    """Raises RecipeError for the first line without a reference."""
    from skd_plugin.tasks.label import Label

    for number, row in enumerate(rows, start=1):
        label = row.get(label_key)
        if label is not None and not isinstance(label, str):
            raise RecipeError(f"{path}: '{label_key}' of prompt {number} is {label!r}, but a reference is a text")
        if not Label.parse(label).reference:
            raise RecipeError(f"{path}: prompt {number} has no reference in '{label_key}' (openrlhf.data.label_key)")
