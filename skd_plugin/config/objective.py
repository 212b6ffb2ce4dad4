"""`skd.objective` of a recipe: what the distillation loss and the policy loss count beside each other."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from skd_plugin.config.movable import Scheduled, extremes, value_at
from skd_plugin.config.section import Section, refuse_idle


class Coefficients(NamedTuple):
    """What the two losses count in a training step."""

    kd: float  # the distillation loss
    rl: float  # the policy loss


class ObjectiveConfig(Section):
    kd_coef: Scheduled[Annotated[float, Field(ge=0)]] = Field(1.0, description="weight of the distillation loss")
    rl_coef: Scheduled[Annotated[float, Field(ge=0)]] = Field(
        0.0, description="weight of OpenRLHF's policy loss; where it is ever above 0, rewards are used"
    )
    replaced_tokens: Literal["exclude", "importance"] = Field(
        "exclude",
        description="the teacher's tokens in the policy loss: left out, or weighted by q/p within OpenRLHF's clip",
    )
    teacher_advantage: float = Field(
        0.0, ge=0, description="c: adds c (log p - log q) to the advantage of each of the student's tokens"
    )
    reward_timeout_s: float = Field(300.0, gt=0, description="a reward that takes longer ends the run; seconds")

    @property
    def uses_rewards(self) -> bool:
        return max(extremes(self.rl_coef)) > 0

    def coefficients(self, progress: float) -> Coefficients:
        """Those when this share of training is done."""
        return Coefficients(value_at(self.kd_coef, progress), value_at(self.rl_coef, progress))

    @model_validator(mode="after")
    def _something_is_learned(self) -> ObjectiveConfig:
        effects = dict.fromkeys(("replaced_tokens", "teacher_advantage"), self.uses_rewards)
        refuse_idle(self, effects, "rl_coef is 0, so there is no policy loss")
        for share in range(1001):
            if not any(self.coefficients(share / 1000)):
                raise ValueError(f"kd_coef and rl_coef are both 0 when {share / 10:g} % of training is done")
        return self
