"""How responses will be sampled, in words."""

from __future__ import annotations

from skd_plugin.check.findings import Finding
from skd_plugin.config.movable import ScheduleConfig, TargetAcceptanceConfig
from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.gates import GATES
from skd_plugin.core.methods import METHODS
from skd_plugin.words import count


def check_rule(skd: SKDConfig) -> Finding:
    rollout = skd.rollout
    return Finding("sampling", f"{_gate(rollout, served=skd.is_served)}; {_temperatures(rollout)}")


def _gate(rollout: RolloutConfig, *, served: bool) -> str:
    up_to = "up to " if rollout.draft_len == "auto" else ""
    proposes = f"the student proposes {up_to}{count(rollout.most_drafts, 'token')} a block"
    if served:
        proposes = "the student writes alone, token by token, for a teacher elsewhere to read"
    rule = GATES[rollout.gate_name].words.format(
        top_k=_value(rollout.top_k), threshold=_value(rollout.threshold or 0.0)
    )
    gate = f"{proposes}; one stays if {rule}; else {_otherwise(rollout)}"
    return METHODS[rollout.method].words.format(
        proposes=proposes, gate=gate, mix=rollout.mix, stage_share=rollout.stage_share
    )


def _otherwise(rollout: RolloutConfig) -> str:
    if (leg := rollout.hand_over) is None:
        return "one of the teacher's takes its place"
    until = "" if leg.until_entropy is None else f", or until its entropy is {leg.until_entropy:g} nats or less"
    most = "" if leg.most is None else f", at most {count(leg.most, 'time')} a response"
    return f"the teacher writes {count(leg.tokens, 'token')}{until}{most}"


def _value(value: float | ScheduleConfig | TargetAcceptanceConfig) -> str:
    if isinstance(value, ScheduleConfig):
        return f"{value.start:g} to {value.end:g}"
    if isinstance(value, TargetAcceptanceConfig):
        return f"{value.start:g} at first, then what keeps {value.rate:.0%} of the proposals"
    return str(value) if isinstance(value, int) else f"{value:g}"


def _temperatures(rollout: RolloutConfig) -> str:
    student = f"student T {rollout.student_temperature:g} top-p {rollout.student_top_p:g}"
    return f"{student}, teacher T {rollout.teacher_temperature:g} top-p {rollout.teacher_top_p:g}"
