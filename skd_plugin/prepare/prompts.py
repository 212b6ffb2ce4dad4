"""From rows to prompts, with all that would stop a run at one of them found before it starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import PromptError, PromptForm
from skd_plugin.host.teacher_prompts import is_thinking, teacher_of, teacher_prompt, teachers_lengths
from skd_plugin.prepare.rows import ROWS_AT_ONCE, Dataset, Source, check_column, column, is_text, mixed, values

# Prompts of a dataset that are made and measured: all, or of a larger one some from everywhere in it, and the longest
# and shortest texts. A chat template and a tokenizer take a minute for a million of them, as they will in the run.
PROMPTS_CHECKED = 20_000
EXTREMES = 2_000  # at each end

Where = Callable[[int], str]  # what a person calls a prompt, by its place


def numbered(index: int) -> str:
    return f"prompt {index + 1}"


def make_prompts(rows: Iterable[Mapping[str, Any]], form: PromptForm, where: Where = numbered) -> list[str]:
    """The prompts that a run will make of the rows.

    Raises:
        RecipeError: a row makes none.
    """
    prompts: list[str] = []
    for row in rows:
        try:
            prompts.append(form.prompt(row))
        except PromptError as error:
            raise RecipeError(f"{where(len(prompts))}: {error}") from error
    return prompts


def check_lengths(
    prompts: Sequence[str], form: PromptForm, tokenizer: Any, longest: int, where: Where = numbered
) -> None:
    """Raises RecipeError for the first prompt that OpenRLHF would cut, or SKD could not start from."""
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        part = prompts[start : start + ROWS_AT_ONCE]
        lengths = [len(ids) for ids in tokenizer(list(map(str, part)), add_special_tokens=False).input_ids]
        for index, length in enumerate(lengths, start=start):
            if not 2 <= length <= longest:
                raise RecipeError(
                    f"{where(index)} has {length} tokens, but 2 to {longest} fit (openrlhf.data.max_len minus "
                    f"skd.rollout.max_new_tokens): {prompts[index][:60]!r}..."
                )
        for name, teacher in form.teachers.items():
            if teacher is None:
                continue
            own = [index for index, prompt in enumerate(part) if teacher_of(prompt) == name]
            fit = teachers_lengths([part[i] for i in own], [lengths[i] for i in own], teacher, longest)
            for index, wrong in zip(own, fit, strict=True):
                if wrong is not None:
                    raise RecipeError(f"{where(start + index)}: {wrong}")


def check_thinking(prompts: Iterable[str], allowed: Collection[str]) -> None:
    """Raises RecipeError for the first pair of prompts of which one ends inside a thinking block.

    Args:
        allowed: names of teachers whose prompts may.
    """
    for prompt in prompts:
        texts = {"student": prompt, "teacher": teacher_prompt(prompt) or prompt}
        thinking = [role for role, text in texts.items() if is_thinking(text)]
        if len(thinking) == 1 and teacher_of(prompt) not in allowed:
            raise RecipeError(
                f"the {thinking[0]}'s prompt alone ends inside a thinking block (...{texts[thinking[0]][-30:]!r}), so "
                "that the two models would go on with different things. Set "
                "skd.student.chat_template_kwargs or skd.teacher.chat_template_kwargs, such as {enable_thinking: "
                "false}; skd.teacher.own_thinking=true takes it as it is"
            )


def check_dataset(dataset: Dataset, form: PromptForm, label: str | None, tokenizer: Any, longest: int) -> None:
    """Raises RecipeError for columns that are not there, or a prompt that would stop a run.

    Args:
        label: the column of it, if there is to be one.
        longest: tokens of a prompt.
    """
    for source in dataset.sources:
        _check_teachers(source, form)
        _check_prompts(source, form, tokenizer, longest)
    if label:
        check_column(dataset.whole, label, "openrlhf.data.label_key")


def _check_prompts(source: Source, form: PromptForm, tokenizer: Any, longest: int) -> None:
    """All rows have a text or messages; those that are looked at make prompts of a length that fits."""
    check_column(source, form.key, "openrlhf.data.input_key")
    for name in form.columns[1:]:
        check_column(source, name, "skd.teacher.prompt")
    _check_values(source, form)
    chosen = _chosen(source, form.key)

    def where(index: int) -> str:
        return source.where(chosen[index])

    prompts = make_prompts(source.rows.select_columns(form.columns).select(chosen), form, where)
    check_lengths(prompts, form, tokenizer, longest, where)


def _check_teachers(source: Source, form: PromptForm) -> None:
    """Of all rows: each names one of several."""
    if form.name_key is None:
        return
    check_column(source, form.name_key, "skd.teacher_column")
    for index, name in enumerate(values(source.rows, form.name_key)):
        try:
            form.teacher_of({form.name_key: name})
        except PromptError as error:
            raise RecipeError(f"{source.where(index)}: {error} (skd.teacher_column)") from error


def _check_values(source: Source, form: PromptForm) -> None:
    """Of all rows; by the column's type, where that says enough."""
    import pyarrow.compute as pc

    if is_text(source.rows, form.key):
        nulls = pc.is_null(column(source.rows, form.key))
        place = pc.index(nulls, True).as_py()
        found: Iterable[tuple[int, Any]] = [] if place < 0 else [(place, None)]
    else:
        found = enumerate(values(source.rows, form.key))
    for place, value in found:
        try:
            form.check(value)
        except PromptError as error:
            raise RecipeError(f"{source.where(place)}: {error}{mixed(source.rows, form.key)}") from error


def _chosen(source: Source, key: str) -> Sequence[int]:
    """Places of the rows whose prompts are made, in order."""
    number = len(source.rows)
    if number <= PROMPTS_CHECKED:
        return range(number)
    chosen = {index * number // PROMPTS_CHECKED for index in range(PROMPTS_CHECKED)}
    if is_text(source.rows, key):
        import pyarrow.compute as pc

        by_length = pc.sort_indices(pc.binary_length(column(source.rows, key)))
        chosen.update(by_length[:EXTREMES].to_pylist(), by_length[-EXTREMES:].to_pylist())
    return sorted(chosen)


def check_references(prompts: Iterable[tuple[str, str | None]], where: str = "") -> None:
    """Raises RecipeError for the first prompt without a reference: which ones are needed is drawn.

    Args:
        prompts: what a person calls each, and its reference.
        where: a reference is looked for, in words.
    """
    for name, reference in prompts:
        if not reference:
            raise RecipeError(f"{name} has no reference{where and ' '}{where}, which skd.rollout.method needs")
