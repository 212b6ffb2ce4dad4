"""How responses will be sampled, in words."""

from __future__ import annotations

from typing import Any

from skd_plugin.check.finding import Finding, count
from skd_plugin.config import SKDConfig
from skd_plugin.config.schema import RolloutConfig
from skd_plugin.rollout.engine import SCHEDULER_CLS, WORKER_CLS

GATES = {  # the laws are in core/gates.py
    "top_k": "it is among the teacher's {top_k} most probable",
    "top_p": "it lies in the teacher's nucleus of mass {threshold:g}",
    "floor": "the teacher gives it {threshold:g} or more",
    "typical": "the teacher gives it more than a floor ({threshold:g}) that sinks with the teacher's entropy",
    "confident": "the student is sure of it (q of {threshold:g} or more), or it is among the teacher's {top_k} first",
    "chance": "a coin says so, whatever the models think: it is rejected with probability {threshold:g}",
    "interpolated": "the next token's law stays (1 - t) q + t p, t = {threshold:g}",
}


def check_rule(skd: SKDConfig) -> Finding:
    rollout = skd.rollout
    return Finding("sampling", f"{_gate(rollout)}; {_temperatures(rollout)}")


def _gate(rollout: RolloutConfig) -> str:
    proposes = f"the student proposes {count(rollout.draft_len, 'token')} a block"
    if rollout.method == "on_policy":
        return f"{proposes}; every one stays (on-policy distillation)"
    if rollout.method == "teacher":
        return "every token is the teacher's (supervised distillation)"
    words = GATES.get(rollout.gate, f"the gate '{rollout.gate}' keeps it (threshold {{threshold:g}})")
    rule = words.format(top_k=rollout.top_k, threshold=rollout.threshold or 0.0)
    return f"{proposes}; one stays if {rule}; else one of the teacher's takes its place"


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
