"""What every section of a recipe has in common, and options that are a choice among the names of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import core_schema

from skd_plugin.errors import did_you_mean


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


def refuse_idle(section: Section, effects: dict[str, bool], because: str) -> None:
    """Raises ValueError for an option that is set to another value than its default, and would do nothing."""
    for name, has_effect in effects.items():
        value = getattr(section, name)
        if not has_effect and value != type(section).model_fields[name].default:
            raise ValueError(f"{name} = {value} has no effect: {because}")


@dataclass(frozen=True)
class OneOf:
    """Metadata of an option, `Annotated[str, one_of(TABLE)]`: it is one of the `choices`."""

    choices: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> str:
        """Raises ValueError for anything else; the message lists the choices and names the nearest one."""
        if isinstance(value, str) and value in self.choices:
            return value
        *most, last = map(repr, self.choices)
        near = did_you_mean(value, self.choices) if isinstance(value, str) else ""
        raise ValueError(f"input should be {', '.join(most)} or {last}; got {value!r}{near}")


def one_of(table: Iterable[str]) -> OneOf:
    return OneOf(tuple(table))


def explained(words: dict[str, str]) -> str:
    """Names of a table with what they mean, for the description of an option."""
    return "; ".join(f"{name}: {about}" for name, about in words.items())
