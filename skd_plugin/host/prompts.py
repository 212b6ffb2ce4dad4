"""Datasets and prompts as OpenRLHF reads and makes them: the one way of every command, and of a run."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.teacher import ONLY
from skd_plugin.errors import RecipeError
from skd_plugin.host.teacher_prompts import NAME_COLUMN, MissingValue, PairedPrompt, TeacherForm, check_switches
from skd_plugin.models import load_tokenizer
from skd_plugin.seams import rebind

A_MESSAGE = '{"role": "...", "content": "..."}'


class PromptError(ValueError):
    """A row makes no prompt. The message says what was found and what was expected; where, its caller knows."""


@dataclass(frozen=True)
class PromptForm:
    """How the rows of a dataset become prompts."""

    key: str  # the column
    template: str | None = None  # with a {} for the text
    chat: Callable[..., Any] | None = None  # a tokenizer's apply_chat_template
    teachers: Mapping[str, TeacherForm | None] = field(default_factory=lambda: {ONLY: None})
    """How the prompts of each teacher's own are made, by its name; None: it reads the same."""
    name_key: str | None = None  # the column that names a row's teacher; None: there is one
    whose: str = "student"

    @classmethod
    def of(cls, options: Mapping[str, Any], tokenizer: Any, skd: SKDConfig, *, paired: bool = True) -> PromptForm:
        """The recipe's.

        Args:
            tokenizer: the student's.
            paired: with the teacher's prompts, where it has its own.

        Raises:
            RecipeError: it is none that makes a prompt of every text.
        """
        key, template = options["data.input_key"], options["data.input_template"]
        if options["data.apply_chat_template"]:
            if not tokenizer.chat_template:
                raise RecipeError(
                    "openrlhf.data.apply_chat_template is true, but the student's tokenizer has no chat template; set "
                    "it to false, or give openrlhf.data.input_template"
                )
            if template:
                raise RecipeError(
                    f"openrlhf.data.input_template = {template!r:.200} has no effect: the chat template makes the "
                    "prompts (openrlhf.data.apply_chat_template); leave one of them out"
                )
        elif template:
            _check_template(template)
        switches = skd.student.chat_template_kwargs
        if switches and not options["data.apply_chat_template"]:
            raise RecipeError(
                "skd.student.chat_template_kwargs has no effect: no chat template is applied "
                "(openrlhf.data.apply_chat_template)"
            )
        check_switches(switches, tokenizer, "skd.student")
        chat = partial(tokenizer.apply_chat_template, **switches) if options["data.apply_chat_template"] else None
        form = cls(key, template or None, chat)
        return replace(form, teachers=_teachers(options, skd), name_key=_name_key(skd)) if paired else form

    @property
    def teacher(self) -> TeacherForm | None:
        """Of the only teacher."""
        return self.teachers[ONLY]

    @property
    def words(self) -> str:
        if self.chat is not None:
            return f"the {self.whose}'s chat template"
        return "openrlhf.data.input_template" if self.template is not None else "the text as it is"

    @property
    def columns(self) -> list[str]:
        """That are read of a dataset."""
        own = [column for form in self.teachers.values() if form is not None for column in form.columns]
        return list(dict.fromkeys([self.key, *own, *([self.name_key] if self.name_key else [])]))

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Of the student; a `PairedPrompt` where the teacher has its own, or is one of several.

        Raises:
            PromptError: the row makes none.
        """
        student = self._of_text(row)
        name = self.teacher_of(row)
        teacher = self.teachers[name]
        if teacher is None:
            return PairedPrompt(student, None, name) if name != ONLY else student
        try:
            content = teacher.content(row, student)
        except MissingValue as error:
            raise PromptError(str(error)) from error
        key = teacher.config.column or self.key
        form = PromptForm(key, None, teacher.chat, whose="teacher")
        return PairedPrompt(student, form._of_text({key: content}), name)

    def teacher_of(self, row: Mapping[str, Any]) -> str:
        """Raises PromptError for a row that names no teacher of the recipe."""
        if self.name_key is None:
            return ONLY
        name = row.get(self.name_key)
        if not isinstance(name, str) or name not in self.teachers:
            raise PromptError(
                f"'{self.name_key}' is {_shown(name)}, but must name a teacher: {' or '.join(self.teachers)}"
            )
        return name

    def _of_text(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        self.check(value)
        try:
            prompt, _ = _of_the_host()(row, self.template, self.key, apply_chat_template=self.chat)
        except Exception as error:  # a chat template is a program of the tokenizer's, and says no in its own ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PromptError(f"{self.words} makes no prompt of {value!r:.100}: {reason}") from error
        if not isinstance(prompt, str):
            raise PromptError(f"{self.words} makes {prompt!r:.60} of it, which is no text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            found = f"\\u{ord(prompt[error.start]):04x}"
            raise PromptError(f"'{self.key}' has {found} in it, half of a character, which is no text") from error
        return prompt

    def check(self, value: Any) -> None:
        """Raises PromptError for what is neither a text nor, for a chat template, a list of messages."""
        if isinstance(value, str):
            return
        if self.chat is not None:
            expected = f"a text, or a list of messages like {A_MESSAGE}"
            if isinstance(value, list) and value and all(map(_is_message, value)):
                return
        else:
            expected = "a text"
        raise PromptError(f"'{self.key}' is {_shown(value)}, but must be {expected}{self._advice(value)}")

    def _advice(self, value: Any) -> str:
        if isinstance(value, date):  # a datetime is one
            return "; the library `datasets` takes a column of texts that all look like dates for dates"
        if self.chat is None and isinstance(value, list) and value and all(map(_is_message, value)):
            return "; messages want openrlhf.data.apply_chat_template=true"
        return ""


def _teachers(options: Mapping[str, Any], skd: SKDConfig) -> dict[str, TeacherForm | None]:
    return {name: _teachers_form(options, skd.of_teacher(name)) for name in skd.all_teachers}


def _teachers_form(options: Mapping[str, Any], skd: SKDConfig) -> TeacherForm | None:
    """`skd`: of one teacher."""
    own = skd.teacher_prompts
    if not own:
        return None
    tokenizer = load_tokenizer(skd.the_teacher.model_name_or_path, "teacher")
    if skd.all_tasks:
        return TeacherForm.ready(skd, tokenizer)
    chat = options["data.apply_chat_template"]
    return TeacherForm.of(own[0], skd, options["data.input_key"], tokenizer, chat=chat)


def _name_key(skd: SKDConfig) -> str | None:
    if not skd.teachers:
        return None
    return NAME_COLUMN if skd.all_tasks else skd.teacher_column


def _check_template(template: str) -> None:
    """Raises RecipeError for one that is no text with a place for the prompt."""
    found = f"openrlhf.data.input_template is {template!r:.200}"
    try:
        places = [place[1:] for place in string.Formatter().parse(template) if place[1] is not None]
    except ValueError:  # a single brace
        places = [("?", None, None)]
    if not set(places) <= {("", "", None)}:  # names, and widths that no memory holds
        raise RecipeError(
            f"{found}, in which only {{}} is a place, for the prompt; write {{{{ and }}}} for braces that are text"
        )
    if len(places) != 1:
        raise RecipeError(
            f"{found}, but must have one {{}}, where the prompt goes: without it all prompts would be the same"
        )


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or bool(value.get("tool_calls"))


def _shown(value: Any) -> str:
    if value is None:
        return "missing or null"
    return f"{value!r:.60}" if isinstance(value, int | float | list | dict) else f"{value!s:.60}"


@cache
def _of_the_host() -> Callable[..., tuple[Any, Any]]:
    """OpenRLHF's maker of prompts. To it `<image>` is an image wherever it stands; here no model has images, and it is
    text like any other.
    """
    import openrlhf.datasets.prompts_dataset as host  # which imports transformers: seconds

    rebind(host, "_str_to_content_list", _as_it_is)
    return host.preprocess_data


def _as_it_is(text: str) -> str:
    return text


def load_rows(names: str, *, split: str, limit: int, probs: str | None = None, seed: int = 42) -> Any:
    """The rows of whatever OpenRLHF can load, as a `datasets.Dataset`: a file, a folder, a name on the Hub, or several
    with commas in between.

    Args:
        limit: rows that are taken of each.
        probs: with which one of several gives the next row; None puts one behind the other.

    Raises:
        Exception: what `datasets` and the readers behind it raise.
    """
    from openrlhf.datasets.utils import blending_datasets

    strategy = SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False, args=SimpleNamespace(use_ms=False))
    return blending_datasets(names, probs, strategy, seed, max_count=limit, dataset_split=split)
