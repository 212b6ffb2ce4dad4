"""What each metric is called, counted in and good for; which curves a page shows first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from skd_plugin.report.run_record import RunRecord


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    about: str = ""
    percent: bool = False
    better: Literal["low", "high"] | None = None


FIGURES = [
    Figure("skd/loss", "Loss", "mean over the tokens", better="low"),
    Figure("skd/accept_rate", "Acceptance", "kept share of the student's proposals", percent=True),
    Figure("skd/kl", "KL to the teacher", "KL(p‖q) while sampling, nats a token", better="low"),
    Figure("skd/response_len", "Response length", "tokens, mean of the step"),
    Figure("skd/student_entropy", "Student entropy", "nats a token"),
    Figure("skd/replaced_frac", "Replaced share", "tokens that are the teacher's", percent=True),
    Figure("skd/undrafted_frac", "Undrafted share", "tokens that no student proposed", percent=True),
    Figure("skd/first_replaced_pos", "First replacement", "place in the response"),
    Figure("skd/teacher_nll", "Teacher's NLL", "nats a token of the sampled text"),
    Figure("skd/teacher_topk_mass", "Teacher mass kept", "share inside the entries that the loss sees", percent=True),
    Figure("skd/draft_waste", "Draft waste", "proposals thrown away unread", percent=True),
    Figure("skd/kd_coef", "Weight of the distillation", "in the loss of two terms"),
    Figure("rl/reward", "Reward", "mean of the training responses"),
    Figure("rl/loss", "Policy loss"),
    Figure("rl/coef", "Weight of the policy loss"),
    Figure("rl/own_frac", "Tokens of the policy loss", "share that the student sampled", percent=True),
    Figure("time/step", "Time of a step", "seconds"),
    Figure("time/rollout", "Time of sampling", "seconds a step"),
    Figure("time/train", "Time of training", "seconds a step"),
    Figure("time/sync", "Time of weight sync", "seconds a step"),
    Figure("tokens_per_s", "Throughput", "response tokens a second, training included"),
    Figure("grad_norm", "Gradient norm"),
    Figure("lr", "Learning rate"),
]
EVALUATIONS = {
    "accuracy": Figure("", "Accuracy", "held-out prompts, student alone", percent=True, better="high"),
    "teacher_accuracy": Figure("", "Accuracy of the teacher", "held-out prompts", percent=True),
    "chrf": Figure("", "chrF", "held-out prompts, student alone", percent=True, better="high"),
    "teacher_chrf": Figure("", "chrF of the teacher", "held-out prompts", percent=True),
    "rouge_l": Figure("", "ROUGE-L", "held-out prompts, student alone", percent=True, better="high"),
    "teacher_rouge_l": Figure("", "ROUGE-L of the teacher", "held-out prompts", percent=True),
    "kl": Figure("", "Held-out KL", "KL(p‖q) along the student's own responses, nats a token", better="low"),
    "response_len": Figure("", "Held-out length", "tokens"),
    "teacher_response_len": Figure("", "Response length of the teacher", "tokens, held-out prompts"),
}
SCORES = ("accuracy", "chrf", "rouge_l")  # of which a task has one
FIRST = (*SCORES, "skd/loss", "skd/accept_rate", "skd/kl", "skd/response_len", "skd/student_entropy")


def figures_of(runs: list[RunRecord]) -> list[Figure]:
    """All metrics of the runs; known ones first, in the order above, others by name."""
    names = {name for run in runs for name in run.curves}
    evaluations = sorted(name for name in names if name.startswith("eval/"))
    tasks = {name.split("/")[1] for name in evaluations if name.count("/") >= 2}
    known = [_evaluation(name, len(tasks) > 1) for name in evaluations]
    order = [*EVALUATIONS]
    known.sort(
        key=lambda figure: order.index(last_part(figure.name)) if last_part(figure.name) in order else len(order)
    )
    for figure in FIGURES:
        known += [figure] if figure.name in names else []
        known += [_of_a_task(figure, name) for name in sorted(names) if name.startswith(f"{figure.name}/")]
    others = sorted(names - {figure.name for figure in known})
    return known + [Figure(name, name) for name in others]


def shown_first(figures: list[Figure]) -> list[str]:
    wanted = [figure for first in FIRST for figure in figures if first in (figure.name, evaluated(figure.name))]
    return [figure.name for figure in wanted] or [figure.name for figure in figures[:6]]


def evaluated(name: str) -> str | None:
    """`eval/<task>/accuracy` -> accuracy; None for what is measured while training."""
    return last_part(name) if name.startswith("eval/") else None


def teacher_line(name: str) -> str | None:
    """Name of the teacher's value that belongs into the chart of an evaluation."""
    task, _, part = name.rpartition("/")
    return f"{task}/teacher_{part}" if name.startswith("eval/") and not part.startswith("teacher_") else None


def last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _of_a_task(figure: Figure, name: str) -> Figure:
    """`skd/accept_rate/<task>`: what a run of several tasks has for each."""
    return replace(figure, name=name, title=f"{figure.title} ({last_part(name)})")


def _evaluation(name: str, several_tasks: bool) -> Figure:
    base = EVALUATIONS.get(last_part(name))
    if base is None:
        return Figure(name, name)
    task = f" ({name.split('/')[1]})" if several_tasks else ""
    return Figure(name, base.title + task, base.about, base.percent, base.better)
