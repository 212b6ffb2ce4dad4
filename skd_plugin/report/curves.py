"""Which metrics runs have curves of, in which order a page shows them, and which of them first."""

from __future__ import annotations

from dataclasses import replace

from skd_plugin.core.metrics import EVALUATIONS, METRICS, Metric
from skd_plugin.report.run_record import RunRecord

SCORES = ("accuracy", "chrf", "rouge_l")  # of which a task has one
FIRST = (*SCORES, "skd/loss", "skd/accept_rate", "skd/kl", "skd/response_len", "skd/student_entropy")


def metrics_of(runs: list[RunRecord]) -> list[Metric]:
    """All metrics of the runs; known ones first, in the order above, others by name."""
    names = {name for run in runs for name in run.curves}
    evaluations = sorted(name for name in names if name.startswith("eval/"))
    tasks = {name.split("/")[1] for name in evaluations if name.count("/") >= 2}
    known = [_evaluation(name, len(tasks) > 1) for name in evaluations]
    order = [*EVALUATIONS]
    known.sort(
        key=lambda metric: order.index(last_part(metric.name)) if last_part(metric.name) in order else len(order)
    )
    for metric in METRICS.values():
        known += [metric] if metric.name in names else []
        known += [_of_a_task(metric, name) for name in sorted(names) if name.startswith(f"{metric.name}/")]
    others = sorted(names - {metric.name for metric in known})
    return known + [Metric(name, name) for name in others]


def shown_first(metrics: list[Metric]) -> list[str]:
    wanted = [metric for first in FIRST for metric in metrics if first in (metric.name, evaluated(metric.name))]
    return [metric.name for metric in wanted] or [metric.name for metric in metrics[:6]]


def evaluated(name: str) -> str | None:
    """`eval/<task>/accuracy` -> accuracy; None for what is measured while training."""
    return last_part(name) if name.startswith("eval/") else None


def teacher_line(name: str) -> str | None:
    """Name of the teacher's value that belongs into the chart of an evaluation."""
    task, _, part = name.rpartition("/")
    return f"{task}/teacher_{part}" if name.startswith("eval/") and not part.startswith("teacher_") else None


def last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _of_a_task(metric: Metric, name: str) -> Metric:
    """`skd/accept_rate/<task>`: what a run of several tasks has for each."""
    return replace(metric, name=name, title=f"{metric.title} ({last_part(name)})")


def _evaluation(name: str, several_tasks: bool) -> Metric:
    base = EVALUATIONS.get(last_part(name))
    if base is None:
        return Metric(name, name)
    task = f" ({name.split('/')[1]})" if several_tasks else ""
    return replace(base, name=name, title=base.title + task)
