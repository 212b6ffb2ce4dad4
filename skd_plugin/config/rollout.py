"""`skd.rollout` of a recipe: where the text of training is from, and which options of that go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from skd_plugin.config.movable import Movable, TargetAcceptanceConfig, extremes
from skd_plugin.config.section import Section, explained, one_of, refuse_idle
from skd_plugin.core.gates import CONFIDENCES, CONFIDENT, GATE_OPTIONS, GATES, RELEASED, Gate, gate_of_option
from skd_plugin.core.methods import METHODS
from skd_plugin.core.sampling import KEEP_ALL

GATED = [name for name, method in METHODS.items() if method.has_gate]
DECAYING = [name for name in GATE_OPTIONS if GATES[name].decays]
MOST_DRAFTS = 32  # of a block
WITHOUT_THRESHOLD = [name for name in GATE_OPTIONS if GATES[name].threshold is None]


def _methods_with(option: str) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.option == option)


class HandOverConfig(Section):
    """Legs of the teacher (core/hand_over.py)."""

    tokens: int = Field(ge=1, description="that the teacher writes, the replacing one among them")
    most: int | None = Field(
        2, ge=1, description="legs of a response; after them the student's proposals stay. null: any number"
    )
    until_entropy: float | None = Field(
        None, ge=0, description="nats: a leg ends early where the teacher's entropy is this or less"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of core.sampling.SamplingSettings."""
        return {
            "hand_over_len": self.tokens,
            "hand_overs": KEEP_ALL if self.most is None else self.most,
            "hand_over_until": -1.0 if self.until_entropy is None else self.until_entropy,
        }


class RolloutConfig(Section):
    method: Annotated[str, one_of(METHODS)] = Field(
        "skd",
        description="where the text is from. " + explained({name: m.about for name, m in METHODS.items()}),
    )
    mix: float = Field(
        0.5, ge=0, le=1, description=f"of {_methods_with('mix')}: share of the prompts that are sampled"
    )
    stage_share: float = Field(
        0.5, ge=0, le=1, description=f"of {_methods_with('stage_share')}: share of training spent on references"
    )
    top_k: Movable[Annotated[int, Field(ge=1)]] = Field(
        25, description="K: a student token among the teacher's K most probable ones is kept"
    )
    gate: Annotated[str, one_of(GATE_OPTIONS)] = Field(
        "top_k",
        description="which proposals are kept. "
        + explained({n: GATES[n].words.format(top_k="K", threshold="threshold") for n in GATE_OPTIONS}),
    )
    threshold: Movable[Annotated[float, Field(ge=0)]] | None = Field(
        None, description=f"of the gate; every gate but {' and '.join(WITHOUT_THRESHOLD)} needs one"
    )
    confidence: Annotated[str, one_of(CONFIDENCES)] = Field(
        "probability", description="of gate confident: what the student's confidence is measured by"
    )
    replacement: Literal["sample", "argmax"] = Field(
        "sample", description="the teacher's token in place of a rejected one: sampled, or its most probable"
    )
    write_back: bool = Field(True, description="false: rejected tokens stay in the text and are only flagged")
    hand_over: HandOverConfig | None = Field(
        None, description="where the gate rejects, the teacher writes on before the student takes over again"
    )
    top_k_decay_len: int | None = Field(None, ge=1, description="response tokens over which K falls to 1")
    reference_compat: bool = Field(False, description="rank and temperatures as in SKD's released code")
    draft_len: Annotated[int, Field(ge=1, le=MOST_DRAFTS)] | Literal["auto"] = Field(
        5, description="tokens the student proposes before the teacher looks (gamma); auto: the engine chooses"
    )
    max_draft_len: int = Field(8, ge=1, le=MOST_DRAFTS, description="of draft_len auto: the most that are proposed")
    student_temperature: float = Field(1.0, ge=0, description="of the proposals; 0 is greedy")
    student_top_p: float = Field(1.0, gt=0, le=1, description="of the proposals: nucleus")
    teacher_temperature: float = Field(1.0, ge=0, description="of the replacement tokens")
    teacher_top_p: float = Field(1.0, gt=0, le=1, description="of the replacement tokens: nucleus")
    max_new_tokens: int | None = Field(None, ge=1, description="longest response; default: what max_len leaves")
    horizon: Movable[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="tokens at which responses are cut in training, below max_new_tokens; evaluations are not. With "
        "target_acceptance it grows where more is accepted",
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="what reads the logits. "
        + explained(
            {
                "auto": "triton on a GPU where it is installed, else torch",
                "torch": "PyTorch's operators",
                "triton": "kernels that make few passes over the logits; compared with torch at the start",
            }
        ),
    )
    seed: int = Field(0, description="same seed, same prompt: same tokens, whatever else is in the batch")

    @property
    def most_drafts(self) -> int:
        """Tokens of the longest block."""
        return self.max_draft_len if self.draft_len == "auto" else self.draft_len

    @property
    def needs_references(self) -> bool:
        return METHODS[self.method].needs_references

    @property
    def gate_name(self) -> str:
        """The gate that proposals are put to, a name of core.gates.GATES."""
        return RELEASED if self.reference_compat else gate_of_option(self.gate, self.confidence)

    @property
    def has_top_k(self) -> bool:
        """Whether any token is put to the teacher's K most probable ones."""
        return METHODS[self.method].has_gate and GATES[self.gate_name].has_top_k

    @property
    def _named_gate(self) -> Gate:
        """The gate of the options `gate` and `confidence`, whatever reference_compat makes of it."""
        return GATES[gate_of_option(self.gate, self.confidence)]

    @property
    def notice(self) -> str | None:
        """What a person is told once, at the start."""
        if not self.reference_compat:
            return None
        return (
            "skd.rollout.reference_compat: as in SKD's released code, the rank is taken after the teacher's "
            "temperature and top-p, and the student drafts with them too; student_temperature and student_top_p are "
            "not used"
        )

    @model_validator(mode="after")
    def _threshold_belongs_to_the_gate(self) -> RolloutConfig:
        known = self._named_gate.threshold
        if (self.threshold is None) != (known is None):
            need = "needs a" if self.threshold is None else "has no"
            raise ValueError(f"gate '{self.gate}' {need} threshold (skd.rollout.threshold)")
        highest = max(extremes(self.threshold)) if self.threshold is not None else 0.0
        if known is not None and known.is_probability and highest > 1:
            raise ValueError(f"the threshold of gate '{self.gate}' is a probability; got {highest:g}")
        return self

    @model_validator(mode="after")
    def _values_that_move(self) -> RolloutConfig:
        if min(extremes(self.top_k)) < 1:
            raise ValueError(f"top_k is at least 1, and one end of its schedule is {min(extremes(self.top_k)):g}")
        if self.horizon is not None and min(extremes(self.horizon)) < 1:
            raise ValueError(f"horizon is at least 1, and one end of its schedule is {min(extremes(self.horizon)):g}")
        movable = ("top_k", "threshold", "horizon")
        moving = [n for n in movable if isinstance(getattr(self, n), TargetAcceptanceConfig)]
        if moving and not METHODS[self.method].has_gate:
            raise ValueError(
                f"{moving[0]} follows the rate of acceptance, but method '{self.method}' puts no token to a gate"
            )
        if len(moving) > 1:
            raise ValueError(f"{' and '.join(moving)} cannot both follow the rate of acceptance: fix one of them")
        if moving == ["top_k"] and not self.has_top_k:
            raise ValueError(f"top_k follows the rate of acceptance, but gate '{self.gate}' has no K")
        return self

    @model_validator(mode="after")
    def _options_of_other_methods(self) -> RolloutConfig:
        method = METHODS[self.method]
        effects = {option: method.option == option for option in ("mix", "stage_share")}
        effects["confidence"] = self.gate == CONFIDENT
        refuse_idle(self, effects, f"the method is {self.method}, the gate {self.gate}")
        refuse_idle(self, {"max_draft_len": self.draft_len == "auto"}, f"draft_len is {self.draft_len}")
        return self

    @model_validator(mode="after")
    def _options_that_need_a_gate(self) -> RolloutConfig:
        needs = {
            "write_back: false": not self.write_back,
            "top_k_decay_len": self.top_k_decay_len is not None,
            "hand_over": self.hand_over is not None,
            "reference_compat": self.reference_compat,
        }
        for name, given in needs.items():
            if given and not METHODS[self.method].has_gate:
                raise ValueError(
                    f"{name} changes a gate, but method '{self.method}' has none; use method {' or '.join(GATED)}"
                )
        gate = self._named_gate
        if self.top_k_decay_len is not None and not gate.decays:
            raise ValueError(f"top_k_decay_len is for gate {' or '.join(DECAYING)}, but the gate is '{self.gate}'")
        if not self.write_back and not gate.can_flag:
            raise ValueError(
                f"gate '{self.gate}' writes the student's second answer back; leave write_back: false out"
            )
        if self.hand_over is not None and not self.write_back:
            raise ValueError("hand_over lets the teacher write on, and write_back: false lets it write nothing")
        if self.replacement == "argmax" and not gate.replaces_from_teacher:
            raise ValueError(
                f"gate '{self.gate}' draws replacements from {gate.replaced_from}, without which the next token's "
                "distribution would be another; use replacement: sample"
            )
        if self.reference_compat and (self.gate != "top_k" or self.replacement != "sample"):
            raise ValueError("reference_compat is the released gate: it needs gate: top_k and replacement: sample")
        return self
