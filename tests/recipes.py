"""Recipes of the repository, and how a run of them is made small."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"
PAIR = RECIPES / "models" / "arithmetic"
SMALL = [
    "skd.task.train_prompts=8",
    "skd.task.eval_prompts=4",
    "openrlhf.rollout.batch_size=2",
    "openrlhf.rollout.micro_batch_size=1",
    "openrlhf.train.batch_size=2",
    "openrlhf.train.micro_batch_size=1",
]
