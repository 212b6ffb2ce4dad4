"""How responses will be sampled, in words."""

from __future__ import annotations

from typing import Any

from skd_plugin.check.findings import Finding
from skd_plugin.config.movable import ScheduleConfig, TargetAcceptanceConfig
from skd_plugin.config.schema import RolloutConfig, SKDConfig
from skd_plugin.core.gates import GATES
from skd_plugin.core.methods import METHODS
from skd_plugin.engine.offline import SCHEDULER_CLS, WORKER_CLS
from skd_plugin.words import count


def check_rule(skd: SKDConfig) -> Finding:
    rollout = skd.rollout
    return Finding("sampling", f"{_gate(rollout)}; {_temperatures(rollout)}")


def _gate(rollout: RolloutConfig) -> str:
    proposes = f"the student proposes {count(rollout.draft_len, 'token')} a block"
    rule = GATES[rollout.gate_name].words.format(
        top_k=_value(rollout.top_k), threshold=_value(rollout.threshold or 0.0)
    )
    gate = f"{proposes}; one stays if {rule}; else one of the teacher's takes its place"
    return METHODS[rollout.method].words.format(
        proposes=proposes, gate=gate, mix=rollout.mix, stage_share=rollout.stage_share
    )


def _value(value: Any) -> str:
    if isinstance(value, ScheduleConfig):
        return f"{value.start:g} to {value.end:g}"
    if isinstance(value, TargetAcceptanceConfig):
        return f"{value.start:g} at first, then what keeps {value.rate:.0%} of the proposals"
    return str(value) if isinstance(value, int) else f"{value:g}"


def _temperatures(rollout: RolloutConfig) -> str:
    student = f"student T {rollout.student_temperature:g} top-p {rollout.student_top_p:g}"
    return f"{student}, teacher T {rollout.teacher_temperature:g} top-p {rollout.teacher_top_p:g}"


EXPECTED = {"sampler": "SKDSampler", "drafter": "SKDDrafter"}


def asked_for(skd: SKDConfig) -> Finding:
    """Without a self-test there is no engine to ask."""
    parts = " and ".join(path.rsplit(".", 1)[-1] for path in (WORKER_CLS, SCHEDULER_CLS))
    drafts = count(skd.rollout.draft_len, "draft")
    return Finding("engine", f"asked for, and not yet seen to run: {parts} in vLLM's V1 runner, {drafts} a block")


def check_parts(description: dict[str, Any]) -> Finding:
    """What a real engine says of itself (`describe_skd`): a plugin that is silently off is the worst outcome."""
    wrong = [part for part, name in EXPECTED.items() if description.get(part) != name]
    found = (
        f"{description.get('sampler')} and {description.get('drafter')} are in place, in vLLM's V1 runner under "
        f"{description.get('scheduler')}; {count(description['draft_len'], 'draft')} a block"
    )
    if not wrong:
        return Finding("engine", found)
    return Finding(
        "engine",
        f"{', '.join(f'the {part} is {description.get(part)}' for part in wrong)}: SKD is not active",
        "failed",
        "another plugin or a newer vLLM replaced it; run pytest tests/contract",
    )
