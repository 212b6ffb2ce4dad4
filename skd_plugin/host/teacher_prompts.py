"""Prompts of the teacher's own, made of the same rows as the student's, and by the teacher's own chat template."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.teacher import ONLY, TeacherPromptConfig
from skd_plugin.errors import RecipeError
from skd_plugin.tasks.label import Label

THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"))  # marks of templates, around a block
COLUMN = "teacher_prompt"  # of the rows that tasks make
NAME_COLUMN = "teacher"  # of the same rows, where there are several teachers
EXAMPLE = '{"input": "...", "output": "..."}'


class Turns(NamedTuple):
    """An example."""

    input: str
    output: str


class PairedPrompt(str):
    """The student's prompt with what is known of its teacher. To OpenRLHF it is the text that it is, and so it
    arrives, with its pair, in the engines and in their samples.
    """

    teacher: str | None  # what the teacher reads in its place; None: the same
    name: str  # of its teacher, where there are several

    def __new__(cls, student: str, teacher: str | None, name: str = ONLY) -> PairedPrompt:
        made = super().__new__(cls, student)
        made.teacher, made.name = teacher, name
        return made

    def __reduce__(self) -> Any:
        return PairedPrompt, (str(self), self.teacher, self.name)


def teacher_prompt(prompt: str) -> str | None:
    """The teacher's own beside a prompt; None: it reads the student's."""
    return prompt.teacher if isinstance(prompt, PairedPrompt) else None


def teacher_of(prompt: str) -> str:
    """The name of a prompt's teacher, a key of `SKDConfig.all_teachers`."""
    return prompt.name if isinstance(prompt, PairedPrompt) else ONLY


@dataclass(frozen=True)
class TeacherForm:
    """How rows become prompts of the teacher."""

    config: TeacherPromptConfig
    key: str  # the column of the student's prompt
    tokenizer: Any  # the teacher's
    chat: Callable[..., Any] | None  # its apply_chat_template
    examples: Sequence[Turns] = ()
    longest: int | None = None  # tokens; None: as of the student's
    may_be_shorter: bool = False  # than the student's: the two do not live in one engine

    @classmethod
    def of(cls, config: TeacherPromptConfig, skd: SKDConfig, key: str, tokenizer: Any, *, chat: bool) -> TeacherForm:
        """
        Args:
            skd: of this teacher alone.
            tokenizer: the teacher's.
            chat: prompts are made by chat templates (openrlhf.data.apply_chat_template).

        Raises:
            RecipeError: it is none that makes a prompt of every row.
        """
        switches = skd.the_teacher.chat_template_kwargs
        if chat and not tokenizer.chat_template:
            raise RecipeError(
                "skd.teacher.prompt is made by the teacher's chat template (openrlhf.data.apply_chat_template), but "
                "its tokenizer has none; put a chat_template.jinja into its folder"
            )
        if switches and not chat:
            raise RecipeError(
                "skd.teacher.chat_template_kwargs has no effect: no chat template is applied "
                "(openrlhf.data.apply_chat_template)"
            )
        check_switches(switches, tokenizer, "skd.teacher")
        places(config.template)
        examples = read_examples(config.examples) if config.examples else ()
        apply = partial(tokenizer.apply_chat_template, **switches) if chat else None
        return cls(config, key, tokenizer, apply, examples, skd.longest_teacher_prompt, skd.is_served)

    @classmethod
    def ready(cls, skd: SKDConfig, tokenizer: Any) -> TeacherForm:
        """Of rows of tasks, in which the teacher's prompts are as it reads them."""
        config, longest = TeacherPromptConfig(column=COLUMN), skd.longest_teacher_prompt
        return cls(config, COLUMN, tokenizer, None, (), longest, skd.is_served)

    @property
    def columns(self) -> list[str]:
        """Of a dataset, those that it reads beside the student's."""
        return [self.config.column] if self.config.column else places(self.config.template)

    def content(self, row: Mapping[str, Any], prompt: str) -> Any:
        """What goes into the template of a chat, as messages, or the text without one.

        Args:
            prompt: the student's, for a teacher without chat template that reads the same.

        Raises:
            MissingValue: the row lacks something.
        """
        found = row.get(self.config.column or self.key)
        if self.config.template is not None:
            text = _last_text(found)
            filled = _fill(self.config.template, {"input": text, **row, self.key: text})
            found = [*found[:-1], {**found[-1], "content": filled}] if isinstance(found, list) else filled
        elif self.config.column is None and self.chat is None:
            found = prompt
        if self.chat is None:
            before = [self.config.system, *(example.input + example.output for example in self.examples)]
            return (
                "\n\n".join(text for text in (*before, found) if text is not None) if isinstance(found, str) else found
            )
        if isinstance(found, str):
            found = [{"role": "user", "content": found}]
        if not isinstance(found, list):
            return found
        turns = [
            {"role": role, "content": text}
            for example in self.examples
            for role, text in (("user", example.input), ("assistant", example.output))
        ]
        first = [message for message in found[:1] if message.get("role") == "system"]
        if self.config.system is not None:
            return [{"role": "system", "content": self.config.system}, *turns, *found[len(first) :]]
        return [*first, *turns, *found[len(first) :]]


class MissingValue(ValueError):
    """A row lacks what a template names."""


def _last_text(value: Any) -> Any:
    """Of a list of messages, what the last one says."""
    return value[-1].get("content") if isinstance(value, list) and value and isinstance(value[-1], dict) else value


def places(template: str | None) -> list[str]:
    """The columns that a template names.

    Raises:
        RecipeError: it names none, or is no template.
    """
    if template is None:
        return []
    found = f"the template of the teacher's prompt is {template!r:.200}"
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise RecipeError(f"{found}: {error}; write {{{{ and }}}} for braces that are text") from error
    names = [name for name, form, how in parts if name and not form and how is None and not set(name) & set(".[")]
    if len(names) < len(parts):
        raise RecipeError(
            f"{found}, in which a place is more than the name of a column in braces, such as {{solution}}"
        )
    if not names:
        raise RecipeError(f"{found}, but must name a column in braces: without it all prompts would be the same")
    return list(dict.fromkeys(names))


def _fill(template: str, row: Mapping[str, Any]) -> str:
    values = {**_of_a_label(row.get("label")), **row}
    for name in places(template):
        if values.get(name) is None:
            there = ", ".join(key for key, value in values.items() if value is not None)
            raise MissingValue(f"the teacher's prompt needs '{name}', which is not there; there are {there}")
    return template.format_map(values)


def _of_a_label(label: Any) -> dict[str, Any]:
    """What a task of ours says of its prompt."""
    parsed = Label.parse(label)
    return {} if parsed.task is None else {"reference": parsed.reference, "answer": parsed.answer}


def check_switches(switches: Mapping[str, Any], tokenizer: Any, whose: str) -> None:
    """Raises RecipeError for a switch that the chat template does not ask for; Jinja would not say."""
    template = str(tokenizer.chat_template or "")
    for name in switches:
        if name not in template:
            raise RecipeError(
                f"{whose}.chat_template_kwargs: the chat template has no {name!r}, so that it would do nothing"
            )


def read_examples(path: str) -> list[Turns]:
    """Raises RecipeError for a file that is none of examples."""
    where = f"skd.teacher.prompt.examples: {path}"
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where} cannot be read: {error}") from error
    try:
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    except ValueError as error:
        raise RecipeError(f"{where} is no JSON: {error}; each example is {EXAMPLE}") from error
    for number, row in enumerate(rows, start=1):
        if (
            not isinstance(row, dict)
            or set(row) != {"input", "output"}
            or not all(isinstance(v, str) for v in row.values())
        ):
            raise RecipeError(f"{where}: example {number} is {row!r:.80}, but must be {EXAMPLE}")
    if not rows:
        raise RecipeError(f"{where} is empty; leave it out, or give an example such as {EXAMPLE}")
    return [Turns(**row) for row in rows]


def is_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside a block of thoughts."""
    return any(prompt.rfind(begin) > prompt.rfind(end) for begin, end in THINKING)


def teachers_lengths(
    prompts: Sequence[str], lengths: Sequence[int], form: TeacherForm, longest: int
) -> Iterator[str | None]:
    """What is wrong with the length of the teacher's prompt beside each of the student's, if something is.

    Args:
        lengths: tokens of the student's.
        longest: tokens of a prompt, where the teacher's has no limit of its own.
    """
    most = form.longest or longest
    texts = [teacher_prompt(prompt) or str(prompt) for prompt in prompts]
    for length, text, ids in zip(
        lengths, texts, form.tokenizer(texts, add_special_tokens=False).input_ids, strict=True
    ):
        if len(ids) > most:
            yield (
                f"the teacher's prompt has {len(ids)} tokens, but {most} fit: set skd.teacher.prompt.max_len; it "
                f"begins with {text[:60]!r}"
            )
        elif len(ids) < length and not form.may_be_shorter:
            yield (
                f"the teacher's prompt has {len(ids)} tokens, the student's {length}: in the engine the student lives "
                "in the teacher's places, so its prompt must not be the longer one. Give the teacher more to read; "
                f"its prompt begins with {text[:60]!r}"
            )
        else:
            yield None


def teachers_ids(prompt: str, ids: Sequence[int], student: Any, teacher: Any) -> list[int] | None:
    """What the teacher reads where the student reads `ids`: its own prompt, and what follows the student's (in an
    agent's later turns responses and feedback). None: the same.

    Args:
        student, teacher: their tokenizers.

    Raises:
        ValueError: the ids do not begin with the student's prompt.
    """
    of_teacher = teacher_prompt(prompt)
    if of_teacher is None:
        return None
    own = student(str(prompt), add_special_tokens=False).input_ids
    if list(ids[: len(own)]) != own:
        raise ValueError(
            "the teacher's own prompt (skd.teacher.prompt) takes the place of the student's; but the agent asks for a "
            f"response to a text that does not begin with that: {student.decode(list(ids))[:80]!r}"
        )
    return [*teacher(of_teacher, add_special_tokens=False).input_ids, *ids[len(own) :]]
