"""Whether SKD's parts are in the engine, and not vLLM's own."""

from __future__ import annotations

from collections.abc import Mapping

from skd_plugin.check.findings import Finding
from skd_plugin.config.schema import SKDConfig
from skd_plugin.engine.arguments import SCHEDULER_CLS, WORKER_CLS
from skd_plugin.words import count

EXPECTED = {"sampler": "SKDSampler", "drafter": "SKDDrafter"}


def asked_for(skd: SKDConfig) -> Finding:
    """Without a self-test there is no engine to ask."""
    parts = " and ".join(path.rsplit(".", 1)[-1] for path in (WORKER_CLS, SCHEDULER_CLS))
    drafts = count(skd.rollout.draft_len, "draft")
    return Finding("engine", f"asked for, and not yet seen to run: {parts} in vLLM's V1 runner, {drafts} a block")


def check_parts(description: Mapping[str, str | int]) -> Finding:
    """What a real engine says of itself (`describe_skd`): a plugin that is silently off is the worst outcome."""
    wrong = [part for part, name in EXPECTED.items() if description.get(part) != name]
    found = (
        f"{description.get('sampler')} and {description.get('drafter')} are in place, in vLLM's V1 runner under "
        f"{description.get('scheduler')}; {count(int(description['draft_len']), 'draft')} a block"
    )
    if not wrong:
        return Finding("engine", found)
    return Finding(
        "engine",
        f"{', '.join(f'the {part} is {description.get(part)}' for part in wrong)}: SKD is not active",
        "failed",
        "another plugin or a newer vLLM replaced it; run pytest tests/contract",
    )
