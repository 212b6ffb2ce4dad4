"""How responses will be sampled, in words."""

from __future__ import annotations

from typing import Any

from skd_plugin.check.findings import Finding
from skd_plugin.config.movable import ScheduleConfig, TargetAcceptanceConfig
from skd_plugin.config.schema import RolloutConfig, SKDConfig
from skd_plugin.engine.offline import SCHEDULER_CLS, WORKER_CLS
from skd_plugin.words import count

GATES = {  # the laws are in core/gates.py
    "top_k": "it is among the teacher's {top_k} most probable",
    "ask_again": "it is among the teacher's {top_k} most probable, or else is drawn again from them",
    "top_p": "it lies in the teacher's nucleus of mass {threshold}",
    "floor": "the teacher gives it {threshold} or more",
    "typical": "the teacher gives it more than a floor ({threshold}) that sinks with the teacher's entropy",
    "confident": "the student is sure of it ({confidence}), or it is among the teacher's {top_k} first",
    "chance": "a coin says so, whatever the models think: it is rejected with probability {threshold}",
    "interpolated": "the next token's law stays (1 - t) q + t p, t = {threshold}",
}


CONFIDENCE = {
    "probability": "q of {threshold} or more",
    "margin": "the two largest q are {threshold} or more apart",
    "entropy": "an entropy of {threshold} nats or less",
}


def check_rule(skd: SKDConfig) -> Finding:
    rollout = skd.rollout
    return Finding("sampling", f"{_gate(rollout)}; {_temperatures(rollout)}")


METHODS = {  # all but those whose text is the gate's alone
    "on_policy": "{proposes}; every one stays (on-policy distillation)",
    "teacher": "every token is the teacher's (supervised distillation)",
    "seq_kd": "every token is the teacher's, and is the label (sequence-level distillation)",
    "supervised": "every response is the dataset's reference",
    "mixed": "with probability {mix:g} a prompt's response is the student's own, else its reference",
    "mixed_skd": "a share of {mix:g} of the prompts is sampled, the others are answered by references: {gate}",
    "two_stage": "references for the first {stage_share:g} of training, then the student's own text",
}


def _gate(rollout: RolloutConfig) -> str:
    proposes = f"the student proposes {count(rollout.draft_len, 'token')} a block"
    words = GATES.get(rollout.gate, f"the gate '{rollout.gate}' keeps it (threshold {{threshold}})")
    threshold = _value(rollout.threshold or 0.0)
    confidence = CONFIDENCE[rollout.confidence].format(threshold=threshold)
    rule = words.format(top_k=_value(rollout.top_k), threshold=threshold, confidence=confidence)
    gate = f"{proposes}; one stays if {rule}; else one of the teacher's takes its place"
    if rollout.method not in METHODS:
        return gate
    return METHODS[rollout.method].format(
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
