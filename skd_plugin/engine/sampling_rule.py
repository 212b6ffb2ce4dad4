"""How responses are sampled: the gate, the two models' sampling settings, and whether a reference is taken instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from skd_plugin.config.movable import TargetAcceptanceConfig, value_at
from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.core.gates import GATES
from skd_plugin.core.methods import METHODS
from skd_plugin.core.sampling import KEEP_ALL, SamplingSettings
from skd_plugin.core.schedules import TargetAcceptance


@dataclass(frozen=True)
class SamplingRule:
    settings: SamplingSettings
    reference_share: float = 0.0  # of the prompts that are answered by their reference
    horizon: int | None = None  # tokens at which a response is cut, where its own limit is not lower; None: nowhere

    @classmethod
    def of(
        cls, rollout: RolloutConfig, progress: float = 0.0, controlled: Mapping[str, float] | None = None
    ) -> SamplingRule:
        """The rule at a point of training.

        Args:
            progress: share of training that is done, 0 to 1.
            controlled: present values of those options that follow a measurement; a missing one stands at its
                start.
        """
        method, moved = METHODS[rollout.method], controlled or {}
        settings = SamplingSettings(
            top_k=0 if method.source == "teacher" else KEEP_ALL,
            student_temperature=rollout.student_temperature,
            student_top_p=rollout.student_top_p,
            # The argmax is what a temperature of 0 samples.
            teacher_temperature=0.0 if rollout.replacement == "argmax" else rollout.teacher_temperature,
            teacher_top_p=rollout.teacher_top_p,
        )
        if method.has_gate:
            settings = _gated(settings, rollout, progress, moved)
        horizon = None
        if rollout.horizon is not None:
            horizon = max(1, round(_value("horizon", rollout.horizon, progress, moved)))
        return cls(settings, method.reference_share(rollout.mix, rollout.stage_share, progress), horizon)

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

    @property
    def is_teachers(self) -> bool:
        """Whether every token is the teacher's."""
        return self.settings.gate == "top_k" and self.settings.top_k == 0

    def with_top_k(self, top_k: int | None) -> SamplingRule:
        """With another K, if this rule puts tokens to one; None is its own."""
        return self._with(top_k=top_k) if top_k is not None and self._has_top_k else self

    @property
    def _has_top_k(self) -> bool:
        return 0 < self.settings.top_k < KEEP_ALL

    def limit(self, tokens: int) -> int:
        """The longest response of a request that may have so many tokens."""
        return tokens if self.horizon is None else min(tokens, self.horizon)

    def metrics(self) -> dict[str, float]:
        """What a schedule or a controller may move, for the metrics of a step."""
        metrics = {}
        if self._has_top_k:
            metrics["skd/top_k"] = float(self.settings.top_k)
        if GATES[self.settings.gate].threshold is not None:
            metrics["skd/threshold"] = self.settings.threshold
        if self.horizon is not None:
            metrics["skd/horizon"] = float(self.horizon)
        return metrics


def _gated(
    settings: SamplingSettings, rollout: RolloutConfig, progress: float, controlled: Mapping[str, float]
) -> SamplingSettings:
    """The same under the gate of the recipe."""
    gate = GATES[rollout.gate_name]
    top_k = max(1, round(_value("top_k", rollout.top_k, progress, controlled)))
    threshold = None if gate.threshold is None else rollout.threshold
    settings = replace(
        settings,
        gate=rollout.gate_name,
        top_k=top_k if gate.has_top_k else 0,
        threshold=0.0 if threshold is None else _value("threshold", threshold, progress, controlled),
        top_k_decay_len=rollout.top_k_decay_len or 0,
        write_back=rollout.write_back,
        **({} if rollout.hand_over is None else rollout.hand_over.settings),
    )
    if not rollout.reference_compat:
        return settings
    return replace(settings, student_temperature=settings.teacher_temperature, student_top_p=settings.teacher_top_p)


class RulePlan:
    """The rule of every step of a run: schedules follow the step, controllers follow what was measured."""

    def __init__(self, rollout: RolloutConfig, planned_steps: int, vocab_size: int, longest: int) -> None:
        """Args: longest: tokens that a response may have at most, whatever the horizon is."""
        self._rollout = rollout
        self._planned_steps = max(planned_steps, 1)
        self._controllers = _controllers(rollout, vocab_size, longest)

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


def _controllers(rollout: RolloutConfig, vocab_size: int, longest: int) -> dict[str, TargetAcceptance]:
    controllers = {}
    if isinstance(rollout.top_k, TargetAcceptanceConfig):
        controllers["top_k"] = _controller(rollout.top_k, 1, 1.0, float(vocab_size))
    threshold = GATES[rollout.gate_name].threshold
    if isinstance(rollout.threshold, TargetAcceptanceConfig) and threshold is not None:
        # A threshold is multiplied, so it never comes back from 0.
        controllers["threshold"] = _controller(rollout.threshold, threshold.sign, 1e-6, threshold.highest(vocab_size))
    if isinstance(rollout.horizon, TargetAcceptanceConfig):
        # Longer where more is accepted than asked for: the text is then the student's for longer.
        controllers["horizon"] = _controller(rollout.horizon, -1, 1.0, float(longest))
    return controllers


def _controller(config: TargetAcceptanceConfig, sign: int, lowest: float, highest: float) -> TargetAcceptance:
    return TargetAcceptance(config.rate, config.start, sign, config.gain, lowest, highest)
