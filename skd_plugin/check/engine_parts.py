"""Whether SKD's parts are in the engine, and not vLLM's own."""

from __future__ import annotations

from skd_plugin.check.findings import Finding
from skd_plugin.config.schema import SKDConfig
from skd_plugin.engine.arguments import SCHEDULER_CLS, WORKER_CLS, EngineDescription
from skd_plugin.words import count


def asked_for(skd: SKDConfig) -> Finding:
    """Without a self-test there is no engine to ask."""
    parts = " and ".join(path.rsplit(".", 1)[-1] for path in (WORKER_CLS, SCHEDULER_CLS))
    drafts = count(skd.rollout.most_drafts, "draft")
    return Finding("engine", f"asked for, and not yet seen to run: {parts} in vLLM's V1 runner, {drafts} a block")


def check_parts(engine: EngineDescription, scheduler: str) -> Finding:
    """What a real engine says of itself: a plugin that is silently off is the worst outcome."""
    parts = {"sampler": (engine["sampler"], "SKDSampler"), "drafter": (engine["drafter"], "SKDDrafter")}
    wrong = [f"the {part} is {found}" for part, (found, expected) in parts.items() if found != expected]
    if wrong:
        return Finding(
            "engine",
            f"{', '.join(wrong)}: SKD is not active",
            "failed",
            "another plugin or a newer vLLM replaced it; run pytest tests/contract",
        )
    return Finding(
        "engine",
        f"{engine['sampler']} and {engine['drafter']} are in place, in vLLM's V1 runner under {scheduler}; "
        f"{count(engine['draft_len'], 'draft')} a block",
    )
