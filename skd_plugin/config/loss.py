"""`skd.loss` of a recipe: what a token teaches, and how much it counts."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, model_validator

from skd_plugin.config.section import Section, explained, one_of, refuse_idle
from skd_plugin.core.losses import LOSSES, PARAMETERS, LossSettings, RegionSettings
from skd_plugin.core.prompt_weights import PROMPT_WEIGHTINGS
from skd_plugin.core.targets import REGIONS
from skd_plugin.core.token_weights import WEIGHTINGS


class ReweightConfig(Section):
    by: Annotated[str, one_of(WEIGHTINGS)] = Field(
        "none",
        description="which tokens count more. " + explained({name: w.words for name, w in WEIGHTINGS.items()}),
    )
    floor: float = Field(0.1, ge=0, lt=1, description="least weight of a token relative to the most")

    @model_validator(mode="after")
    def _floor_has_an_effect(self) -> ReweightConfig:
        refuse_idle(self, {"floor": self.by != "none"}, "by is none")
        return self


class PromptWeightConfig(Section):
    by: Annotated[str, one_of(PROMPT_WEIGHTINGS)] = Field(
        "none",
        description="which prompts count more, by what their responses have shown. "
        + explained({name: w.words for name, w in PROMPT_WEIGHTINGS.items()}),
    )
    floor: float = Field(0.1, ge=0, lt=1, description="least weight of a prompt relative to the most")
    memory: float = Field(0.5, ge=0, lt=1, description="share of its earlier score that a prompt keeps")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> PromptWeightConfig:
        refuse_idle(self, dict.fromkeys(("floor", "memory"), self.by != "none"), "by is none")
        return self


LossKind = Annotated[str, one_of(LOSSES)]


def _of_losses(parameter: str) -> str:
    """The description of an option that is a parameter of some losses."""
    names = ", ".join(name for name, loss in LOSSES.items() if parameter in loss.parameters)
    return f"of {names}: {PARAMETERS[parameter]}"


class RegionConfig(Section):
    """Another loss for some tokens (core/targets.py)."""

    where: Annotated[str, one_of(REGIONS)] = Field(description=explained({n: r.words for n, r in REGIONS.items()}))
    kind: LossKind = Field(description="the loss there")
    threshold: float | None = Field(None, ge=0, allow_inf_nan=False, description="of the region, if it has one")

    @model_validator(mode="after")
    def _threshold_belongs_to_the_region(self) -> RegionConfig:
        if (self.threshold is None) == REGIONS[self.where].has_threshold:
            raise ValueError(f"region '{self.where}' {'needs a' if self.threshold is None else 'has no'} threshold")
        return self


class LossConfig(Section):
    kind: LossKind = Field(
        "forward_kl",
        description="what is learned of the teacher's distribution p by the student's q. "
        + explained({name: loss.words for name, loss in LOSSES.items()}),
    )
    replaced_kind: LossKind | None = Field(None, description="the same, for replaced tokens; default: kind")
    regions: tuple[RegionConfig, ...] = Field(
        (),
        description="the same, for tokens of a kind: a list of {where, kind, threshold}; a token of several has the "
        "loss of the first. "
        + explained({name: region.words.format(threshold="threshold") for name, region in REGIONS.items()}),
    )
    beta: float = Field(0.5, gt=0, lt=1, description=_of_losses("beta"))
    alpha: float = Field(0.1, ge=0, lt=1, description=_of_losses("alpha"))
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="tau of both models in a divergence; cross_entropy has none"
    )
    teacher_top_k: int = Field(64, ge=1, description="teacher entries kept a token; all others are one tail category")
    student_top_k: int = Field(
        0, ge=0, description="the student's most probable tokens that are categories of their own beside these"
    )
    vocabulary: Literal["top_k", "full"] = Field(
        "top_k", description="full: the divergence of all tokens, from the teacher's hidden states and output head"
    )
    chunk: int | None = Field(
        128,
        ge=1,
        description="response tokens whose student's logits a training step has in memory at once, or as many as have "
        "4 million logits; null: those of all tokens, as always where they are more than the head's product (a cap, "
        "scale, bias, adapter)",
    )
    accepted_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of tokens that the gate kept")
    replaced_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of tokens that it replaced")
    handed_weight: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="factor of tokens of the teacher's legs (rollout.hand_over), after the replacing one; default: "
        "replaced_weight",
    )
    clamp: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="upper limit of a token's loss; no gradient above it"
    )
    prefix_tokens: int | None = Field(None, ge=1, description="only so many tokens of a response are learned")
    reweight: ReweightConfig = ReweightConfig()
    prompts: PromptWeightConfig = PromptWeightConfig()

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> LossConfig:
        kinds = self.kinds
        losses = [LOSSES[kind] for kind in kinds]
        effects = {name: any(name in loss.parameters for loss in losses) for name in PARAMETERS}
        effects["temperature"] = any(loss.has_temperature for loss in losses)
        effects["student_top_k"] = effects["temperature"] and self.vocabulary == "top_k"
        whole = " over all tokens" if self.vocabulary == "full" else ""
        refuse_idle(self, effects, f"the loss is {' and '.join(sorted(kinds))}{whole}")
        if self.vocabulary == "full" and self.chunk is None:
            raise ValueError("chunk is null, but vocabulary: full never makes all logits; give it a number")
        if self.accepted_weight == self.replaced_weight == 0:
            raise ValueError("accepted_weight and replaced_weight are both 0: no token would be trained")
        if self.replaced_kind is not None and any(region.where == "replaced" for region in self.regions):
            raise ValueError("replaced_kind is the loss of region 'replaced', which regions names, too: leave one out")
        return self

    @property
    def kinds(self) -> set[str]:
        """Losses that some tokens have."""
        return {self.kind, self.replaced_kind or self.kind, *(region.kind for region in self.regions)}

    @property
    def settings(self) -> LossSettings:
        """What core.losses.make_token_loss makes a loss of."""
        given = {field.name: getattr(self, field.name) for field in fields(LossSettings)}
        return LossSettings(**given | {"regions": tuple(RegionSettings(**dict(own)) for own in self.regions)})
