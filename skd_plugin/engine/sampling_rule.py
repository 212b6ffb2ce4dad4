"""How responses are sampled: the gate, the two models' sampling settings, and whether a reference is taken instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skd_plugin.config.movable import TargetAcceptanceConfig, value_at
from skd_plugin.config.schema import RolloutConfig
from skd_plugin.core.sampling import KEEP_ALL, SamplingSettings
from skd_plugin.core.schedules import TargetAcceptance
from skd_plugin.engine.request_table import RequestParams

CONFIDENCE_GATES = {"probability": "confident", "margin": "confident_margin", "entropy": "confident_entropy"}
# Whether more is accepted (1) or less (-1) when a gate's threshold rises.
ACCEPTANCE_SIGN = {
    "top_p": 1, "floor": -1, "typical": -1, "confident": -1, "confident_margin": -1, "confident_entropy": 1,
    "chance": -1, "interpolated": -1,
}  # fmt: skip


@dataclass(frozen=True)
class SamplingRule:
    settings: SamplingSettings
    reference_share: float = 0.0  # of the prompts that are answered by their reference

    @classmethod
    def of(
        cls, rollout: RolloutConfig, progress: float = 0.0, controlled: Mapping[str, float] | None = None
    ) -> SamplingRule:
        """The rule at a point of training.

        Args:
            progress: share of training that is done, 0 to 1.
            controlled: present values of those among `top_k` and `threshold` that follow a measurement; a missing one
                stands at its start.
        """
        rule = METHODS[rollout.method](rollout, progress, controlled or {})
        # The argmax is what a temperature of 0 samples.
        return rule._with(teacher_temperature=0.0) if rollout.replacement == "argmax" else rule

    def _with(self, **settings: Any) -> SamplingRule:
        return replace(self, settings=replace(self.settings, **settings))

    def student_only(self, temperature: float, top_p: float = 1.0) -> SamplingRule:
        """Every proposal is kept: plain sampling of the student (greedy at temperature 0)."""
        own = self.settings
        return SamplingRule(
            SamplingSettings(
                KEEP_ALL,
                student_temperature=temperature,
                student_top_p=top_p,
                teacher_temperature=own.teacher_temperature,
                teacher_top_p=own.teacher_top_p,
            )
        )

    def teacher_only(self, temperature: float, top_p: float = 1.0) -> SamplingRule:
        """No proposal is kept: plain sampling of the teacher."""
        own = self.settings
        return SamplingRule(
            SamplingSettings(
                top_k=0,
                student_temperature=own.student_temperature,
                student_top_p=own.student_top_p,
                teacher_temperature=temperature,
                teacher_top_p=top_p,
            )
        )

    def with_top_k(self, top_k: int | None) -> SamplingRule:
        """With another K, if this rule puts tokens to one; None is its own."""
        return self._with(top_k=top_k) if top_k is not None and self._has_top_k else self

    @property
    def _has_top_k(self) -> bool:
        return 0 < self.settings.top_k < KEEP_ALL

    def request(
        self, prompt_ids: Sequence[int], trace_id: int, seed: int, forced_ids: list[int] | None = None
    ) -> RequestParams:
        return RequestParams(trace_id, len(prompt_ids), prompt_ids[-1], seed, self.settings, forced_ids)

    def figures(self) -> dict[str, float]:
        """What a schedule or a controller may move, for the figures of a step."""
        figures = {}
        if self._has_top_k:
            figures["skd/top_k"] = float(self.settings.top_k)
        if self.settings.gate in ACCEPTANCE_SIGN:
            figures["skd/threshold"] = self.settings.threshold
        return figures


def gated(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """SKD: the student's text under the gate."""
    gate = CONFIDENCE_GATES[rollout.confidence] if rollout.gate == "confident" else rollout.gate
    top_k = max(1, round(_value("top_k", rollout.top_k, progress, controlled)))
    has_threshold = rollout.threshold is not None
    rule = on_policy(rollout, progress, controlled)._with(
        gate=gate,
        top_k=top_k if gate in TOP_K_GATES else 0,
        threshold=_value("threshold", rollout.threshold, progress, controlled) if has_threshold else 0.0,
        top_k_decay_len=rollout.top_k_decay_len or 0,
        write_back=rollout.write_back,
    )
    if not rollout.reference_compat:
        return rule
    return rule._with(
        gate="top_k_of_nucleus",
        student_temperature=rule.settings.teacher_temperature,
        student_top_p=rule.settings.teacher_top_p,
    )


TOP_K_GATES = ("top_k", "ask_again", *CONFIDENCE_GATES.values())


def on_policy(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """GKD (arXiv 2306.13649) with all data from the student: every proposal is kept."""
    return SamplingRule(
        SamplingSettings(
            KEEP_ALL,
            student_temperature=rollout.student_temperature,
            student_top_p=rollout.student_top_p,
            teacher_temperature=rollout.teacher_temperature,
            teacher_top_p=rollout.teacher_top_p,
        )
    )


def teacher_text(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """Text of the teacher alone; with the loss cross_entropy it is sequence-level distillation (arXiv 1606.07947)."""
    return on_policy(rollout, progress, controlled)._with(top_k=0)


def supervised(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """The dataset's references; with the loss cross_entropy it is plain fine-tuning."""
    return replace(on_policy(rollout, progress, controlled), reference_share=1.0)


def mixed(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """Per prompt, with probability `mix` the student's text, else the reference (ImitKD, arXiv 2009.07253)."""
    return replace(on_policy(rollout, progress, controlled), reference_share=1.0 - rollout.mix)


def mixed_skd(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """Per prompt, with probability `mix` an SKD text, else the reference."""
    return replace(gated(rollout, progress, controlled), reference_share=1.0 - rollout.mix)


def two_stage(rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]) -> SamplingRule:
    """References for the first `stage_share` of training, then on-policy."""
    stage = supervised if progress < rollout.stage_share else on_policy
    return stage(rollout, progress, controlled)


METHODS = {
    "skd": gated,
    "on_policy": on_policy,
    "teacher": teacher_text,
    "seq_kd": teacher_text,
    "supervised": supervised,
    "mixed": mixed,
    "mixed_skd": mixed_skd,
    "two_stage": two_stage,
}


class RulePlan:
    """The rule of every step of a run: schedules follow the step, controllers follow what was measured."""

    def __init__(self, rollout: RolloutConfig, planned_steps: int, vocab_size: int) -> None:
        self._rollout = rollout
        self._planned_steps = max(planned_steps, 1)
        self._controllers = _controllers(rollout, vocab_size)

    def at(self, step: int) -> SamplingRule:
        """The rule of the step that follows `step` finished ones; the same after a resume with the same state."""
        values = {name: controller.value for name, controller in self._controllers.items()}
        return SamplingRule.of(self._rollout, min(step / self._planned_steps, 1.0), values)

    def observe(self, accept_rate: float) -> None:
        """Takes in `skd/accept_rate` of a finished step."""
        for controller in self._controllers.values():
            controller.observe(accept_rate)

    def state_dict(self) -> dict[str, float]:
        """Empty where nothing is controlled: a schedule has no state."""
        return {name: controller.value for name, controller in self._controllers.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Raises ValueError for the state of another recipe."""
        if set(state) != set(self._controllers):
            raise ValueError(
                f"the checkpoint holds controlled values of {sorted(state)}, but this recipe controls "
                f"{sorted(self._controllers)}; resume with the recipe of the run"
            )
        for name, controller in self._controllers.items():
            controller.value = float(state[name])


def _value(name: str, setting: Any, progress: float, controlled: Mapping[str, float]) -> float:
    if isinstance(setting, TargetAcceptanceConfig):
        return controlled.get(name, setting.start)
    return value_at(setting, progress)


def _controllers(rollout: RolloutConfig, vocab_size: int) -> dict[str, TargetAcceptance]:
    gate = CONFIDENCE_GATES[rollout.confidence] if rollout.gate == "confident" else rollout.gate
    highest = {"top_k": float(vocab_size), "threshold": math.log(vocab_size) if gate == "confident_entropy" else 1.0}
    lowest = {"top_k": 1.0, "threshold": 1e-6}  # a threshold is multiplied, so it never comes back from 0
    return {
        name: TargetAcceptance(
            setting.rate,
            setting.start,
            1 if name == "top_k" else ACCEPTANCE_SIGN[gate],
            setting.gain,
            lowest[name],
            highest[name],
        )
        for name, setting in (("top_k", rollout.top_k), ("threshold", rollout.threshold))
        if isinstance(setting, TargetAcceptanceConfig)
    }
