"""What every section of a recipe has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


def refuse_idle(section: Section, effects: dict[str, bool], because: str) -> None:
    """Raises ValueError for an option that is set to another value than its default, and would do nothing."""
    for name, has_effect in effects.items():
        value = getattr(section, name)
        if not has_effect and value != type(section).model_fields[name].default:
            raise ValueError(f"{name} = {value} has no effect: {because}")
