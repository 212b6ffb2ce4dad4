"""Options whose value may move over training: by a schedule, or after the measured rate of acceptance."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from skd_plugin.config.section import Section, one_of
from skd_plugin.core.schedules import SHAPES, scheduled


class ScheduleConfig(Section):
    """A value that moves over training; core.schedules.scheduled is its formula."""

    kind: Annotated[str, one_of(SHAPES)]
    start: float = Field(alias="from", ge=0)
    end: float = Field(alias="to", ge=0)
    hold: float = Field(0.1, ge=0, lt=1, description="share of training at `from` before the value moves")
    over: float = Field(1.0, gt=0, le=1, description="share of training at which `to` is reached")

    @model_validator(mode="after")
    def _moves_after_it_holds(self) -> ScheduleConfig:
        if self.hold >= self.over:
            raise ValueError(f"`hold` = {self.hold} must be below `over` = {self.over}: both are shares of training")
        return self

    def at(self, progress: float) -> float:
        """The value when this share of training is done."""
        return scheduled(self.kind, self.start, self.end, self.hold, self.over, progress)

    @property
    def extremes(self) -> tuple[float, ...]:
        return self.start, self.end


class TargetAcceptanceConfig(Section):
    """A value that follows the measured rate of acceptance; core.schedules.TargetAcceptance is its rule."""

    kind: Literal["target_acceptance"]
    rate: float = Field(gt=0, lt=1, description="rate of acceptance to hold")
    start: float = Field(gt=0, description="value of the first step")
    gain: float = Field(1.0, gt=0, description="change of ln(value) for an error of 1 in the rate")

    @property
    def extremes(self) -> tuple[float, ...]:
        return (self.start,)


# The alternatives of an option's type, by the names that pydantic gives them in its errors: of one that may move, and
# of a number of prompts.
VALUE_FORMS = ("number", "schedule", "controller", "constrained-int", "int", "literal['full']")


def _form(value: Any) -> str | None:
    kind = value.get("kind", "") if isinstance(value, dict) else getattr(value, "kind", None)
    if kind is None:
        return "number"
    if not isinstance(kind, str):
        return None
    return "schedule" if kind in SHAPES else "controller" if kind == "target_acceptance" else None


def _by_form(kinds: str) -> Discriminator:
    expected = f"a mapping here has kind: {kinds}"
    return Discriminator(_form, custom_error_type="unknown_kind", custom_error_message=expected)


_Number = TypeVar("_Number", int, float)
_Schedule = Annotated[ScheduleConfig, Tag("schedule")]
_Controller = Annotated[TargetAcceptanceConfig, Tag("controller")]

# Types of an option that is a number, which may have bounds (`Scheduled[Annotated[int, Field(ge=1)]]`), or that moves
# over training: by a schedule; by a schedule or a controller.
Scheduled = Annotated[Annotated[_Number, Tag("number")] | _Schedule, _by_form(" or ".join(SHAPES))]
Movable = Annotated[
    Annotated[_Number, Tag("number")] | _Schedule | _Controller,
    _by_form(f"{' or '.join(SHAPES)}, or target_acceptance"),
]


def extremes(value: float | ScheduleConfig | TargetAcceptanceConfig) -> tuple[float, ...]:
    """The values between which an option may move."""
    return (value,) if isinstance(value, int | float) else value.extremes


def value_at(value: float | ScheduleConfig, progress: float) -> float:
    """An option that may follow a schedule, when this share of training is done."""
    return value.at(progress) if isinstance(value, ScheduleConfig) else value
