"""Writes docs/options.md from the schema of a recipe:  python scripts/make_options_page.py"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from skd_plugin.config.host_options import host_defaults
from skd_plugin.config.host_support import as_yaml, default_of, support_of
from skd_plugin.config.movable import ScheduleConfig, TargetAcceptanceConfig
from skd_plugin.config.schema import SKDConfig, field_docs
from skd_plugin.config.section import OneOf
from skd_plugin.config.task import TaskConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"

HEAD = """\
# Options

Every option of the `skd:` section of a recipe. This page is made from `skd_plugin/config/` by
`python scripts/make_options_page.py`; do not edit it by hand.

Give an option in a recipe (nested, `skd: {rollout: {top_k: 10}}`), as `skd.rollout.top_k=10` after the recipe on the
command line, or as the flag `--skd.rollout.top_k 10`. An option that would do nothing is refused. OpenRLHF's own
options are the section `openrlhf:`; `skd train --help` lists both, and
[host_rules.py](../skd_plugin/config/host_rules.py) holds what a distillation run sets or refuses among them.

*Moves* marks a value that may also be a mapping: `linear` or `cosine` is a
[schedule](rollout.md#values-that-move-over-training); `target_acceptance`, of `top_k`, `threshold` and `horizon`
only, follows the rate of acceptance.
"""

HOST_HEAD = """
## OpenRLHF's options

What OpenRLHF's parser takes, and what a distillation run makes of it (`skd_plugin/config/host_support.py`). *Honoured*
is as in OpenRLHF's own runs where nothing else is said; *refused* is an error that gives the reason.
"""

# Heading -> prefix of the options below it, and the page that explains them.
SECTIONS: dict[str, tuple[str, str]] = {
    "Teacher": ("skd.teacher", "Several in one run: [several_teachers.md](several_teachers.md)."),
    "Rollout: where the text comes from": (
        "skd.rollout.",
        "Distributions, sources and examples: [rollout.md](rollout.md).",
    ),
    "Loss": (
        "skd.loss.",
        "Formulas and recipes: [losses.md](losses.md), [full_vocabulary.md](full_vocabulary.md).",
    ),
    "Objective: rewards beside the teacher": (
        "skd.objective.",
        "Recipes, curves, reasons: [rlhf.md](rlhf.md).",
    ),
    "Task": ("skd.task.", "[tasks.md](tasks.md). Each entry of `skd.tasks` has the same options."),
    "Evaluation": ("skd.eval.", "Later evaluations come every `openrlhf.eval.steps` steps."),
    "The run": ("skd.", ""),
}


def page() -> str:
    left = {name: default for name, (default, _) in field_docs().items() if name != "skd.task"}
    left |= {name: default for name, (default, _) in field_docs(TaskConfig, "skd.task").items()}
    parts = [HEAD]
    for heading, (prefix, more) in SECTIONS.items():
        names = [name for name in left if name.startswith(prefix)]
        rows = [_row(name, left.pop(name)) for name in names]
        table = ["| option | default | values | what it is |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"\n## {heading}\n", *([more, ""] if more else []), *table]) + "\n")
    return "".join([*parts, host_page()])


def host_page() -> str:
    rows = []
    for name, default in sorted(host_defaults().items()):
        kind, words = support_of(name)
        if name == "logger.wandb.run_name":
            default = "`ppo_` and the time"
        else:
            default = "none" if default in (None, "") else f"`{as_yaml(default)}`"
        cells = (f"`{name}`", default, default_of(name), kind, words)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([HOST_HEAD, "| option | OpenRLHF's default | ours | | |", "|---|---|---|---|---|", *rows]) + "\n"


def _row(name: str, default: Any) -> str:
    field = _field(name)
    cells = (f"`{name}`", _default(field, default), _values(field.annotation, field.metadata), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _field(name: str) -> FieldInfo:
    """The field of a dotted option; a section may be optional (`skd.task`)."""
    section: type[BaseModel] = SKDConfig
    *parents, last = name.split(".")[1:]
    for parent in parents:
        kinds = (section.model_fields[parent].annotation, *get_args(section.model_fields[parent].annotation))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section.model_fields[last]


def _default(field: FieldInfo, default: Any) -> str:
    if field.is_required():
        return "required"
    if default is None:
        return "none"
    return f"`{as_yaml(default)}`".replace("`()`", "none")


def _values(kind: Any, limits: list[Any]) -> str:
    """A type in words."""
    kind, limits = _plain(kind, limits)
    for limit in limits:
        if isinstance(limit, OneOf):
            return ", ".join(f"`{choice}`" for choice in limit.choices)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        forms = [form for form in get_args(kind) if form is not types.NoneType]
        words = [_values(form, limits) for form in forms if not _moves(form)]
        return ", ".join([*words, *(["moves"] if any(map(_moves, forms)) else [])])
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "`true`, `false`",
        dict: "mapping",
        tuple: "list",
    }
    return " ".join([names.get(get_origin(kind) or kind, "list"), *_limits(limits)])


def _plain(kind: Any, limits: list[Any]) -> tuple[Any, list[Any]]:
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        limits = [*limits, *more]
    return kind, limits


def _moves(form: Any) -> bool:
    return _plain(form, [])[0] in (ScheduleConfig, TargetAcceptanceConfig)


def _limits(limits: list[Any]) -> list[str]:
    """Bounds, wherever pydantic keeps them: as objects of their own, or in a nested field."""
    flat = [inner for limit in limits for inner in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(x, name):g}" for name, sign in signs.items() for x in flat if hasattr(x, name)]
    return [", ".join(found)] if found else []


if __name__ == "__main__":
    PAGE.write_text(page())
