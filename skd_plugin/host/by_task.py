"""Metrics of each task of a run, by the `datasource` that the dataset gives every prompt, and of each teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skd_plugin.core.metrics import Figures, rollout_metrics
from skd_plugin.host.run_prompts import UNNAMED
from skd_plugin.tasks.base import HELD_OUT, further_metrics
from skd_plugin.tasks.label import Label

PER_TASK = ("skd/accept_rate", "skd/kl", "skd/response_len")  # metrics that a run of several tasks has for each


def sources(*datasets: Any) -> dict[str, str]:
    """Prompt -> name of its task, of OpenRLHF's prompt datasets; None among them is left out."""
    return {
        prompt: HELD_OUT if source == UNNAMED else source
        for dataset in datasets
        if dataset is not None
        for prompt, source in zip(dataset.prompts, dataset.datasources, strict=True)
    }


def grouped(items: Sequence[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """Items by name, in the order of the names."""
    groups: dict[str, list[Any]] = {name: [] for name in sorted(set(names))}
    for item, name in zip(items, names, strict=True):
        groups[name].append(item)
    return groups


def of_teacher(name: str) -> str:
    """What stands in place of a task's name in the metrics of one of several teachers."""
    return f"teacher_{name}"


def rollout_by_task(figures: Sequence[Figures], names: Sequence[str]) -> dict[str, float]:
    """`skd/accept_rate/<task>` and the like, of the tasks that the step has."""
    metrics = {name: rollout_metrics(group) for name, group in grouped(figures, names).items()}
    return {f"{key}/{name}": found[key] for name, found in metrics.items() for key in PER_TASK if key in found}


def scores(
    rewards: Sequence[float], responses: Sequence[str], labels: Sequence[str], *, by_checker: bool
) -> dict[str, float]:
    """Mean reward of one task's responses, and the task's further metrics.

    Args:
        by_checker: the rewards are the task's own scores; else the mean is called accuracy, whatever it is.
    """
    task = Label.parse(labels[0]).checker() if by_checker else None
    metric = task.metric if task else "accuracy"
    answers = [Label.parse(label).answer for label in labels]
    return {metric: sum(rewards) / len(rewards), **further_metrics(task, responses, answers)}
