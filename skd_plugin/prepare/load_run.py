"""From a recipe to what is made of it: `load_models` for sampling, `load_run` for training.

Everything that can be wrong in a recipe is found here, before Ray, vLLM or DeepSpeed is started. Nothing is written.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from skd_plugin import trust
from skd_plugin.adapters import ALL_LINEAR, LoraOptions, refuse_adapter
from skd_plugin.config import host_rules
from skd_plugin.config.context import engine_len
from skd_plugin.config.host_options import (
    HostOptions,
    check_by_host,
    host_arguments,
    host_defaults,
    host_parser,
    host_values,
)
from skd_plugin.config.host_ranges import check_ranges
from skd_plugin.config.movable import extremes
from skd_plugin.config.recipe import load_recipe
from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig, parse_skd
from skd_plugin.config.versions import check_versions
from skd_plugin.config.vllm_options import check_vllm
from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import PromptForm
from skd_plugin.models import check_saving, joined_ends, joined_ends_words
from skd_plugin.prepare.model_checks import (
    check_adapters,
    check_experts,
    check_full_weights,
    check_layers_to_spread,
    check_output_head,
    check_pair,
    check_ring,
)
from skd_plugin.prepare.prompts import check_dataset, check_references, check_thinking, make_prompts
from skd_plugin.prepare.rows import Dataset, check_column, content_digest, mixed, read_dataset, task_digest, values
from skd_plugin.prepare.servers import refuse_joined_ends
from skd_plugin.prepare.task_prompts import TASK_COLUMNS, draw_prompts, longest_response, task_options
from skd_plugin.prepare.teachers import check_alike, check_each_has_prompts, named, share_out
from skd_plugin.prepare.user_code import check_user_code
from skd_plugin.run_folder import RunFolder
from skd_plugin.tasks.label import Label

PROMPTS_KEPT = 1000  # of a run, for those who look at it before it starts


@dataclass(frozen=True)
class Models:
    """The part of a recipe that any use of it needs: the two models, and the engine's sizes."""

    skd: SKDConfig
    given: HostOptions  # those of the recipe, with the defaults of a distillation run
    defaults: HostOptions  # OpenRLHF's own
    cpu: bool

    @property
    def options(self) -> HostOptions:
        """All of them."""
        return {**self.defaults, **self.given}

    @property
    def row_options(self) -> HostOptions:
        """All of them, with the columns of the rows that tasks make."""
        return {**self.options, **(TASK_COLUMNS if self.skd.all_tasks else {})}

    @property
    def student(self) -> str:
        """Raises RecipeError where the recipe names none."""
        if not self.given.get("actor.model_name_or_path"):
            raise RecipeError("openrlhf.actor.model_name_or_path is missing: the student, a folder or a model name")
        return self.given["actor.model_name_or_path"]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that are one end event; see `joined_ends`."""
        return joined_ends(self.skd.any_teacher.model_name_or_path, self.student) if self.skd.joins_ends else ()

    @property
    def notices(self) -> list[str]:
        """What people are told of sampling before it begins."""
        return [*filter(None, (self.skd.rollout.notice, joined_ends_words(self.tokenizer, self.end_ids)))]

    @property
    def max_len(self) -> int:
        """Tokens of a prompt and its response together."""
        return self.options["data.max_len"]

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens, of the task that needs most, or without tasks of the run; None is whatever max_len leaves."""
        return longest_response(self.skd, self.given_limit)

    @property
    def given_limit(self) -> int | None:
        """The limit on a response that the recipe names: ours, or else OpenRLHF's."""
        own = self.skd.rollout.max_new_tokens
        return self.given.get("rollout.max_new_tokens") if own is None else own

    @property
    def engine_options(self) -> HostOptions:
        """All of them, with the limit on a response that an engine is made for."""
        return {**self.options, "rollout.max_new_tokens": self.max_new_tokens}

    @property
    def engine_len(self) -> int:
        """Tokens of the longest sequence of the engine."""
        return engine_len(self.engine_options, self.skd.longest_teacher_prompt)

    @property
    def longest_prompt(self) -> int:
        """Tokens that leave room for the longest response, or for one token where that has no limit."""
        return self.max_len - (self.max_new_tokens or 1)

    def room_behind(self, ids: Sequence[int], teacher_ids: Sequence[int] | None) -> int:
        """Tokens that a response may have behind a prompt, and behind the teacher's own."""
        room = self.max_len - len(ids)
        return room if teacher_ids is None else min(room, self.engine_len - len(teacher_ids))

    def of_teacher(self, name: str) -> Models:
        """The recipe as it were with this one of several teachers alone."""
        return replace(self, skd=self.skd.of_teacher(name))

    def tokenizer_of(self, teacher: str, student: str) -> Any:
        """The student's, after both models have been found to fit each other and the recipe.

        Raises:
            RecipeError: they do not.
        """
        return check_pair(
            teacher,
            student,
            top_k=int(max([*extremes(self.skd.rollout.top_k), *(task.top_k or 1 for task in self.skd.all_tasks)])),
            teacher_top_k=self.skd.loss.teacher_top_k,
            max_len=self.max_len,
            engine_len=self.engine_len,
            own_prompts=bool(self.skd.teacher_prompts),
            draft_len=self.skd.draft_len,
            served=self.skd.is_served,
            tensor_parallel=self.options["vllm.tensor_parallel_size"],
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The student's, after every teacher has been found to fit it."""
        for name, teacher in self.skd.all_teachers.items():
            with named(name):
                tokenizer = self.of_teacher(name).tokenizer_of(teacher.model_name_or_path, self.student)
        check_alike(self.skd, self.student)
        return tokenizer


def read_models(content: dict[str, Any]) -> Models:
    """The two sections of a recipe, typed and completed. From here on this process may run of models what the recipe
    allows, which is nothing if it says nothing.

    Raises:
        RecipeError: an option of ours is wrong, or a value of OpenRLHF's or vLLM's.
    """
    skd = parse_skd(content.get("skd") or {})
    skd = skd.model_copy(update={"run_dir": str(Path(skd.run_dir).resolve())})
    trust.allow(remote_code=skd.trust_remote_code, pickle_weights=skd.pickle_weights)
    cpu = on_cpu(skd.device)
    given = host_values(host_rules.complete(content.get("openrlhf") or {}, cpu=cpu), host_parser())
    models = Models(skd, given, host_defaults(), cpu)
    check_ranges(given)
    check_vllm(skd.vllm, max_len=models.engine_len, draft_len=skd.draft_len)
    return models


def complete_models(content: dict[str, Any]) -> Models:
    """`read_models`, with what is wrong in versions and options found; no model is looked at.

    Raises:
        RecipeError: what is wrong, what was expected, what to do.
    """
    check_versions()
    models = read_models(content)
    if models.skd.device == "cuda" and not torch.cuda.is_available() and not on_a_cluster():
        raise RecipeError(
            "the recipe wants CUDA (skd.device: cuda), but this machine has no GPU and RAY_ADDRESS names no cluster; "
            "run it on a GPU node, or set skd.device=cpu"
        )
    if models.skd.rollout.kernels == "triton" and models.cpu and not os.environ.get("TRITON_INTERPRET"):
        raise RecipeError(
            "skd.rollout.kernels is triton, whose kernels need a GPU; leave it out (for tests, TRITON_INTERPRET=1 "
            "interprets them on a CPU)"
        )
    host_arguments(models.given, host_parser())
    return models


def on_cpu(device: str) -> bool:
    """Whether a run with this skd.device computes on a CPU."""
    return not torch.cuda.is_available() if device == "auto" else device == "cpu"


def on_a_cluster() -> bool:
    """Whether Ray is told of one, whose GPUs a run uses beside this machine's."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def load_models(recipe: str | Path, overrides: Iterable[str] = ()) -> Models:
    """Reads a recipe and checks its two models; enough for sampling, where there is nothing to train.

    Raises:
        RecipeError: what is wrong, what was expected, what to do.
    """
    models = complete_models(load_recipe(recipe, overrides))
    _ = models.tokenizer  # made here, so that what is wrong is found here
    if models.skd.is_served:
        refuse_joined_ends(models.tokenizer, models.end_ids)
    return models


def load_run(recipe: str | Path, overrides: Iterable[str] = ()) -> Run:
    """`load_models`, and what training needs beside the models: OpenRLHF's options and the prompts.

    Raises:
        RecipeError: what is wrong, what was expected, what to do.
    """
    models = load_models(recipe, overrides)
    skd = models.skd
    host = host_options_of(models)
    complete = {**models.defaults, **host}
    host_rules.check(complete, skd)
    check_by_host(host_arguments(host, host_parser()))
    check_user_code(complete)
    for option in ("critic.model_name_or_path", "reward.model_name_or_path"):
        if complete.get(option):
            trust.refuse_code(complete[option], option.split(".")[0])
            trust.refuse_pickles(complete[option], option.split(".")[0])
    refuse_adapter(models.student, "student")
    check_full_weights(models.student)
    if lora := LoraOptions.of(complete):
        check_adapters(models.student, lora)
    if models.cpu:
        check_experts(models.student)
    if complete["ds.ring_attn_size"] > 1:
        check_ring(models.student, complete["ds.ring_attn_size"], cpu=models.cpu)
    if complete["ds.tensor_parallel_size"] > 1:
        check_layers_to_spread(models.student, complete["ds.tensor_parallel_size"])
    check_saving(models.student, "student")
    if skd.loss.vocabulary == "full":
        for name, teacher in skd.all_teachers.items():
            with named(name):
                check_output_head(teacher.model_name_or_path, "teacher")
        check_output_head(models.student, "student")
    form = PromptForm.of(complete, models.tokenizer, skd)
    if skd.all_tasks:
        data = draw_prompts(skd, form, models.tokenizer, models.longest_prompt, models.given_limit)
        rows, there_are, digest = data["train"], len(data["train"]), task_digest(data)
    else:
        data, (train, digest) = {}, _users_data(models, complete, form)
        rows, there_are = train.whole.rows, train.there_are
    host_rules.check_number(there_are, complete)
    number = min(len(rows), complete["data.max_samples"])
    if form.name_key is not None:
        names = (row["teacher"] for row in rows) if skd.all_tasks else values(rows, form.name_key)
        counts = Counter(islice(names, number))
        check_each_has_prompts(skd, counts, whole=number == there_are)
        skd = share_out(skd, counts, complete["vllm.num_engines"])
    prompts = make_prompts((rows[index] for index in range(min(PROMPTS_KEPT, number))), form)
    check_thinking(prompts, [name for name, teacher in skd.all_teachers.items() if teacher.own_thinking])
    return Run(skd, host, models.cpu, data, number, prompts, digest, models.notices)


def host_options_of(models: Models) -> dict[str, Any]:
    """Those of the recipe with all that follows from the other options of the run."""
    folder = RunFolder(Path(models.skd.run_dir))
    places = {
        "ckpt.output_dir": folder.model,
        "ckpt.path": folder.checkpoints,
        "logger.tensorboard_dir": folder.events,
    }
    host = {
        "logger.wandb.run_name": folder.path.name,  # of its events too, which OpenRLHF keeps in a folder of this name
        **models.given,
        **{option: str(Path(models.given.get(option, place)).resolve()) for option, place in places.items()},
        "rollout.max_new_tokens": models.max_new_tokens,
    }
    if host.get("ds.lora.target_modules") == [ALL_LINEAR]:  # peft knows the word, but not a list of it
        del host["ds.lora.target_modules"]  # it is OpenRLHF's default
    if models.skd.all_tasks:
        host |= task_options(models.skd, host)
    if not any(host.get(name) for name in ("reward.model_name_or_path", "train.agent_func_path")):
        host.setdefault("reward.remote_url", host_rules.NO_REWARD)
    return host


def _users_data(models: Models, options: HostOptions, form: PromptForm) -> tuple[Dataset, str]:
    """The dataset of training, and a digest of all data, after every dataset has been found to fit."""
    datasets = [train := read_prompts("data.prompt_dataset", options)]
    if options.get("eval.dataset"):
        datasets.append(read_prompts("eval.dataset", options))
    label = options.get("data.label_key")
    for dataset in datasets:
        check_dataset(dataset, form, label, models.tokenizer, models.longest_prompt)
    if models.skd.rollout.needs_references:
        _check_references(train, options["data.label_key"])
    own = [teacher.examples for teacher in form.teachers.values() if teacher is not None and teacher.examples]
    examples = "".join(map(repr, own))
    return train, content_digest(datasets, [*form.columns, *([label] if label else []), "datasource"], examples)


def read_prompts(option: str, options: HostOptions) -> Dataset:
    """The dataset of training or of evaluations, as OpenRLHF's `prepare_datasets` loads it.

    Raises:
        RecipeError: it cannot be read.
    """
    how = {"option": f"openrlhf.{option}", "limit": options["data.max_samples"]}
    if option == "eval.dataset":
        return read_dataset(options[option], split=options["eval.split"], **how)
    split, probs, seed = options["data.prompt_split"], options["data.prompt_probs"], options["train.seed"]
    return read_dataset(options[option], split=split, probs=probs, seed=seed, **how)


def _check_references(dataset: Dataset, key: str) -> None:
    for source in dataset.sources:
        check_column(source, key, "openrlhf.data.label_key")
        for index, label in enumerate(values(source.rows, key)):
            if not isinstance(label, str | None):
                why = mixed(source.rows, key)
                raise RecipeError(f"{source.where(index)}: '{key}' is {label!r:.60}, but a reference is a text{why}")
            if not Label.parse(label).reference:
                check_references([(source.where(index), None)], f"in '{key}' (openrlhf.data.label_key)")
