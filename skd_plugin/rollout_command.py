"""`skd rollout`: interleaved responses to a file of prompts, written as traces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from skd_plugin.config.teacher import ONLY
from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import PromptError, PromptForm
from skd_plugin.host.teacher_prompts import COLUMN, TeacherForm, teacher_prompt, teachers_lengths
from skd_plugin.prepare.prompts import check_references
from skd_plugin.prepare.rows import Source, read_dataset
from skd_plugin.run_folder import json_line, out_file
from skd_plugin.tasks.label import Label
from skd_plugin.terminal import say

if TYPE_CHECKING:
    from skd_plugin.prepare.load_run import Models

TEXT, IDS = "prompt", "prompt_ids"  # columns of a file that was written for this command


class Prompt(NamedTuple):
    ids: list[int]
    reference: str | None
    where: str  # file and line
    form: str  # how it was made, in words
    teacher_text: str | None = None  # the teacher's own prompt
    teacher_ids: list[int] | None = None


def run_rollout(
    recipe: str,
    overrides: Iterable[str],
    prompts: str,
    samples: int,
    out: str,
    *,
    raw: bool,
    teacher: str | None = None,
) -> int:
    """
    Args:
        teacher: of several (skd.teachers), the one that all prompts have.
        prompts: a dataset like data.prompt_dataset, or lines with a "prompt" or "prompt_ids".
        raw: texts go in as they are; else as `skd train` would make prompts of them.
    """
    path = out_file(out)
    from skd_plugin.engine.set_up import set_up_offline

    set_up_offline()
    from skd_plugin.adapters import whole
    from skd_plugin.engine.arguments import engine_for
    from skd_plugin.engine.offline import SKDEngine, StudentEngine
    from skd_plugin.engine.sampling_rule import SamplingRule
    from skd_plugin.prepare.load_run import load_models
    from skd_plugin.prepare.servers import ask_servers
    from skd_plugin.served.teacher import Server

    if samples < 1:
        raise RecipeError(f"--samples is {samples}; at least one response a prompt is needed")
    models = _with_teacher(load_models(recipe, overrides), teacher)
    skd, max_len, max_new_tokens = models.skd, models.max_len, models.max_new_tokens
    ask_servers(skd, models.engine_options)
    given = read_prompts(prompts, models, raw=raw)
    forms = " and ".join(dict.fromkeys(prompt.form for prompt in given))
    say(f"{len(given)} prompts of {prompts}, made by this form: {forms}")
    repeated = [prompt for prompt in given for _ in range(samples)]
    for notice in models.notices:
        say(notice)
    rule = SamplingRule.of(skd.rollout)
    rooms = [models.room_behind(prompt.ids, prompt.teacher_ids) for prompt in repeated]
    limits = [rule.limit(min(max_new_tokens or max_len, room)) for room in rooms]
    if rule.reference_share:
        check_references(((prompt.where, prompt.reference) for prompt in given), '("reference": "...")')
    spec = engine_for(skd, models.engine_options, student=models.student, cpu=models.cpu)
    with TemporaryDirectory(prefix="skd-rollout-") as folder:
        student = whole(spec.student, Path(folder), spec.dtype)
        spec = replace(spec, student=student, teacher_hidden=False)
        server = Server.of(skd.the_teacher, spec.teacher_top_k) if skd.is_served else None
        engine = SKDEngine(spec) if server is None else StudentEngine(spec, server)
    finished = engine.generate(
        [prompt.ids for prompt in repeated],
        rule,
        limits,
        seed=skd.rollout.seed,
        texts=[prompt.reference for prompt in repeated],
        teacher_prompts=[prompt.teacher_ids or prompt.ids for prompt in repeated],
        progress=True,
    )
    with path.open("wb") as file:
        for prompt, sample in zip(repeated, finished, strict=True):
            response = engine.decode(sample.trace.response_ids.tolist())
            texts = {"prompt": models.tokenizer.decode(sample.prompt_ids), "response": response}
            trace = sample.trace.to_json(sample.prompt_ids, sample.finish)
            own = {} if prompt.teacher_text is None else {"teacher_prompt": prompt.teacher_text}
            file.write(json_line({**trace, **texts, **own, "prompt_form": prompt.form}))
    say(f"{len(finished)} responses are in {path}")
    return 0


def _with_teacher(models: Models, name: str | None) -> Models:
    """Raises RecipeError: of several teachers none is named, or one that is not there."""
    several = models.skd.teachers
    if name is None and not several:
        return models
    if name is None or name not in several:
        found = f"--teacher {name} is none of the recipe's" if name is not None else "--teacher is missing"
        choice = f"its teachers are {', '.join(several)}" if several else "it has one teacher, which needs no name"
        raise RecipeError(f"{found}: {choice}. All prompts of the file get this one")
    return models.of_teacher(name)


def read_prompts(names: str, models: Models, *, raw: bool) -> list[Prompt]:
    """The prompt of each row, and its reference if it has one.

    Raises:
        RecipeError: a dataset cannot be read, or a row makes no prompt that fits; names its line.
    """
    options = models.row_options
    how = {"split": options["data.prompt_split"], "limit": options["data.max_samples"]}
    found: list[Prompt] = []
    for source in read_dataset(names, option="--prompts", **how).sources:
        form = _form(source, options, models, raw=raw)
        for index, row in enumerate(source.rows):
            try:
                found.append(_prompt(row, form, options["data.label_key"], models, source.where(index)))
            except PromptError as error:
                raise RecipeError(f"{source.where(index)}: {error}") from error
    return found


def _form(source: Source, options: Mapping[str, Any], models: Models, *, raw: bool) -> PromptForm:
    """How the source's rows become prompts. The column is that of training, or else "prompt"; `raw` texts are what
    both models read.
    """
    key, columns = options["data.input_key"], source.rows.column_names
    key = key if key in columns else TEXT
    if key not in columns and IDS not in columns:
        raise RecipeError(
            f"{source.name} has no column '{options['data.input_key']}' (openrlhf.data.input_key), nor '{TEXT}' or "
            f"'{IDS}'; it has {', '.join(columns)}"
        )
    if raw:
        return PromptForm(key)
    form = PromptForm.of({**options, "data.input_key": key}, models.tokenizer, models.skd)
    if form.teacher is None or not models.skd.all_tasks or COLUMN in columns:
        return form
    own = models.skd.teacher_prompts[0]  # these rows are not those that the tasks have made
    chat = form.chat is not None
    teacher = TeacherForm.of(own, models.skd, key, form.teacher.tokenizer, chat=chat)
    return replace(form, teachers={ONLY: teacher})


def _prompt(row: Mapping[str, Any], form: PromptForm, label: str | None, models: Models, where: str) -> Prompt:
    text = None
    if row.get(IDS) is not None:  # what both models read
        ids, how = _checked_ids(row[IDS], len(models.tokenizer)), "token ids as they are"
    else:
        text = form.prompt(row)
        ids, how = models.tokenizer(str(text), add_special_tokens=False).input_ids, form.words
    if not 2 <= len(ids) <= models.longest_prompt:
        raise PromptError(f"the prompt has {len(ids)} tokens; 2 to {models.longest_prompt} fit")
    reference = row.get("reference")
    if reference is None:
        reference = Label.parse(row.get(label) if label else None).reference
    elif not (isinstance(reference, str) and reference):
        raise PromptError(f'"reference" is {reference!r}, but must be a text')
    made = Prompt(ids, reference, where, how)
    if form.teacher is None or text is None:
        return made
    if wrong := next(teachers_lengths([text], [len(ids)], form.teacher, models.longest_prompt)):
        raise PromptError(wrong)
    own = teacher_prompt(text) or text
    return made._replace(teacher_text=own, teacher_ids=form.teacher.tokenizer(own, add_special_tokens=False).input_ids)


def _checked_ids(ids: Any, vocabulary: int) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise PromptError(f"'{IDS}' is {ids!r:.60}, but must be a list of token ids below {vocabulary}")
    return ids
