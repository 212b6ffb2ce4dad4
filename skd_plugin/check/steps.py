"""What a run will do: its prompts, steps, updates and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skd_plugin.check.findings import Finding
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.host_rules import planned_steps
from skd_plugin.words import count


def check_steps(options: HostOptions, number: int, prompts: Sequence[str], tokenizer: Any) -> Finding:
    """Prompts, steps and tokens, by OpenRLHF's own counting (openrlhf.trainer.ppo_trainer.prepare_datasets).

    Args:
        number: of all prompts.
        prompts: those whose tokens are counted.
    """
    samples = options["rollout.n_samples_per_prompt"]
    rounds = planned_steps(number, options["rollout.batch_size"], options["train.num_episodes"])
    responses = options["rollout.batch_size"] * samples
    updates = responses // options["train.batch_size"] * options["train.max_epochs"]
    lengths = [len(ids) for ids in tokenizer(list(map(str, prompts)), add_special_tokens=False).input_ids]
    longest = options["rollout.max_new_tokens"] or options["data.max_len"] - min(lengths)
    mean = sum(lengths) / len(lengths)
    found = (
        f"{number:,} prompts of {min(lengths)} to {max(lengths)} tokens; {rounds:,} steps of {responses:,} "
        f"responses, at most {longest:,} tokens each: up to {responses * (mean + longest):,.0f} tokens a step, "
        f"prompts included; {count(updates, 'update')} of the weights a step"
    )
    if rounds == 0:
        return Finding(
            "steps",
            found,
            "failed",
            "give more prompts, or lower openrlhf.rollout.batch_size: nothing would be trained",
        )
    return Finding("steps", found)
