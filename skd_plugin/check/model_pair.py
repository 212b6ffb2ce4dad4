"""The two models side by side: vocabulary, chat template, end and padding tokens. No weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from skd_plugin.check.findings import Finding
from skd_plugin.config.host_options import HostOptions
from skd_plugin.errors import RecipeError
from skd_plugin.host.teacher_prompts import teacher_prompt
from skd_plugin.models import generation_end_ids, joined_ends_words, load_model_config, load_tokenizer
from skd_plugin.prepare.model_checks import check_vocabularies
from skd_plugin.words import first_line

HEAD, TAIL = 110, 60  # characters shown of a long prompt; its end shows the turn that the student is asked to begin


@dataclass(frozen=True)
class Model:
    """A model's small files."""

    config: Any
    tokenizer: Any
    end_ids: frozenset[int]  # of generation_config.json; empty without one

    @property
    def rows(self) -> int:
        return self.config.get_text_config().vocab_size


def load_model(name: str, role: str) -> Model:
    """Raises RecipeError if there is no such model."""
    return Model(load_model_config(name, role), load_tokenizer(name, role), generation_end_ids(name))


def try_to_load(name: str | None, role: str) -> tuple[Model | None, list[Finding]]:
    """The model, if the recipe names one, and a finding where it does not load."""
    try:
        return (load_model(name, role) if name else None), []
    except RecipeError as error:
        return None, [Finding(role, "does not load", "failed", first_line(error))]


def check_models(
    teacher: Model,
    student: Model,
    options: HostOptions,
    prompts: Sequence[str],
    *,
    refused: bool,
    joined: Sequence[int] = (),
) -> Iterator[Finding]:
    """All that follow.

    Args:
        refused: the recipe does not load.
        joined: tokens that are one end event.
    """
    yield check_vocabulary(teacher, student, refused=refused)
    yield check_template(teacher, student, options, prompts)
    if prompts:
        yield check_first_prompt(str(prompts[0]), student.tokenizer)
        own = teacher_prompt(prompts[0])
        if own is not None:
            yield check_first_prompt(own, teacher.tokenizer, "teacher's first prompt")
    yield from check_end_tokens(teacher, student, joined)
    yield check_padding(student)


def check_vocabulary(teacher: Model, student: Model, *, refused: bool) -> Finding:
    """`refused`: the recipe does not load, so that rows that differ may be the reason."""
    sizes = (
        f"tokens: teacher {len(teacher.tokenizer):,}, student {len(student.tokenizer):,}; "
        f"output rows: teacher {teacher.rows:,}, student {student.rows:,}"
    )
    try:
        check_vocabularies(teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab())
    except RecipeError as error:
        return Finding("vocabulary", sizes, "failed", str(error))
    if teacher.rows == student.rows:
        same = f"the same {len(student.tokenizer):,} tokens, {student.rows:,} output rows in both"
        return Finding("vocabulary", same)
    padding = f"{sizes}: the same tokens, {abs(teacher.rows - student.rows):,} rows of padding apart"
    if refused:
        return Finding("vocabulary", padding, "failed", "pad the smaller embedding to the larger size")
    return Finding("vocabulary", padding)


def check_template(teacher: Model, student: Model, options: HostOptions, prompts: Sequence[str]) -> Finding:
    """OpenRLHF renders prompts with the student's tokenizer, and both models read the same tokens."""
    theirs, ours = teacher.tokenizer.chat_template, student.tokenizer.chat_template
    if options["data.apply_chat_template"]:
        if not ours:
            return Finding(
                "chat template",
                "data.apply_chat_template is true, but the student's tokenizer has no chat template",
                "failed",
                "set openrlhf.data.apply_chat_template=false, give openrlhf.data.input_template, or put the teacher's "
                "chat_template.jinja into the student's folder",
            )
        if prompts and teacher_prompt(prompts[0]) is not None:
            return Finding("chat template", "applied; each model's own")
        if theirs != ours:
            return Finding(
                "chat template",
                f"the student's is applied; the teacher {'has another one' if theirs else 'has none'}",
                "warning",
                "see that the teacher was trained on prompts like the one below; copy its template to the student if "
                "not",
            )
        return Finding("chat template", "applied; the same in both models")
    if options["data.input_template"]:
        return Finding("chat template", "not applied; data.input_template makes the prompts")
    if ours and prompts and not _has_special_token(prompts[0], student.tokenizer):
        return Finding(
            "chat template",
            "not applied, though the student has one and the prompts hold no special token",
            "warning",
            "set openrlhf.data.apply_chat_template=true, unless the models were trained on bare text",
        )
    return Finding("chat template", "not applied; the prompts go in as they are")


def check_first_prompt(prompt: str, tokenizer: Any, name: str = "first prompt") -> Finding:
    """OpenRLHF adds no special token to a prompt, so a BOS that the models expect must be in its text."""
    shown = prompt if len(prompt) <= HEAD + TAIL else f"{prompt[:HEAD]} ... {prompt[-TAIL:]}"
    bare, usual = (tokenizer(prompt, add_special_tokens=add).input_ids for add in (False, True))
    if tokenizer.bos_token_id is not None and usual[0] == tokenizer.bos_token_id != bare[0]:
        return Finding(
            name,
            repr(shown),
            "warning",
            f"it does not begin with {tokenizer.bos_token!r}, which this tokenizer puts first by itself and OpenRLHF "
            f"does not; begin data.input_template or the prompts with it",
        )
    return Finding(name, repr(shown))


def check_end_tokens(teacher: Model, student: Model, joined: Sequence[int] = ()) -> list[Finding]:
    """The engine stops at the end tokens of the teacher's tokenizer and generation_config (vLLM's own rule) and at the
    student's tokenizer's; the finished student will be stopped at its own. Those that are joined are all of them the
    finished student's."""
    if words := joined_ends_words(student.tokenizer, joined):
        return [Finding("end tokens", f"{words} (skd.end_tokens: auto)")]
    name = student.tokenizer.convert_ids_to_tokens
    stops = _end(teacher) | _tokenizer_end(student)
    found = f"the engine stops at {_named(stops, name)}; the student ends at {_named(_end(student), name)}"
    if not stops:
        cut = "every response will be cut at its longest length"
        return [Finding("end tokens", "neither model has one", "warning", cut)]
    problems = [*_unlisted(teacher, "teacher", name), *_unlisted(student, "student", name)]
    if not _end(teacher) <= _end(student):
        problems.append(
            f"the teacher ends at {_named(_end(teacher) - _end(student), name)}, where the finished student will not "
            "stop: add it to eos_token_id in the student's generation_config.json"
        )
    if not _end(student) <= stops:
        problems.append(
            f"the engine does not stop at the student's {_named(_end(student) - stops, name)}: what follows it would "
            "be trained; add it to eos_token_id in the teacher's generation_config.json"
        )
    return [Finding("end tokens", found, "warning", p) for p in problems] or [Finding("end tokens", found)]


def check_padding(student: Model) -> Finding:
    """OpenRLHF pads with the student's pad token, else with its end token, and masks by lengths, never by ids
    (openrlhf.utils.utils.get_tokenizer, openrlhf.trainer.ppo_utils.experience), so that pad = EOS does no harm."""
    tokenizer = student.tokenizer
    if tokenizer.pad_token_id is None:
        return Finding("padding", "no pad token; OpenRLHF takes the end token and masks by length, so none is lost")
    if tokenizer.pad_token_id >= student.rows:
        return Finding(
            "padding",
            f"{tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, but the model has {student.rows} rows",
            "failed",
            "name a pad token inside the vocabulary in the student's tokenizer_config.json (its end token will do)",
        )
    same = ", which is its end token too: harmless here, OpenRLHF masks by length"
    found = f"{tokenizer.pad_token!r}{same if tokenizer.pad_token_id in _end(student) else ''}"
    return Finding("padding", found)


def _tokenizer_end(model: Model) -> frozenset[int]:
    end = model.tokenizer.eos_token_id
    return frozenset() if end is None else frozenset([end])


def _end(model: Model) -> frozenset[int]:
    return _tokenizer_end(model) | model.end_ids


def _unlisted(model: Model, role: str, name: Callable[[int], str]) -> list[str]:
    missing = _tokenizer_end(model) - model.end_ids
    if not model.end_ids or not missing:
        return []
    return [
        f"the {role}'s generation_config.json ends at {_named(model.end_ids, name)}, its tokenizer at "
        f"{_named(missing, name)}: transformers' generate() would run past it; list both in eos_token_id"
    ]


def _named(ids: frozenset[int], name: Callable[[int], str]) -> str:
    return ", ".join(f"{name(i)} ({i})" for i in sorted(ids)) or "nothing"


def _has_special_token(text: str, tokenizer: Any) -> bool:
    return any(token in text for token in [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
