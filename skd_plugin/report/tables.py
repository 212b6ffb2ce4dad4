"""What the tables of a page say: the facts of each run, the metrics side by side, the settings that differ."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from skd_plugin.core.gates import CONFIDENT, GATES
from skd_plugin.core.methods import METHODS
from skd_plugin.core.metrics import Metric
from skd_plugin.report.curves import SCORES, last_part, metrics_of, teacher_line
from skd_plugin.report.run_record import RunRecord, Series
from skd_plugin.words import duration

SECRET = re.compile(r"(^|\.)key$|(^|[._])(api_key|token|secret|password)$")
HIDDEN = "(not shown)"
ABSENT = "-"
MOST_WRITTEN_OUT = 1e15  # a larger number is shown as a power of ten, as in page.js


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    last: str
    best: str = ""  # with its step; empty where the metric has no better direction
    last_leads: bool = False  # the best of the runs' last values
    best_leads: bool = False


def gate(run: RunRecord) -> str:
    method = METHODS.get(run.text("skd.rollout.method") or "")
    return _gate(run) if method is None else method.label.format(gate=_gate(run))


def _gate(run: RunRecord) -> str:
    name = run.text("skd.rollout.gate") or "top_k"
    confidence = run.option("skd.rollout.confidence") if name == CONFIDENT else None
    values = {"K": run.option("skd.rollout.top_k"), "threshold": run.option("skd.rollout.threshold"), "by": confidence}
    if name not in GATES or not GATES[name].has_top_k:
        values["K"] = None
    given = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    return f"{name}, {given}" if given else name


def loss(run: RunRecord) -> str:
    kind, policy = kind_of_loss(run) or "unknown", _coefficient(run, "skd.objective.rl_coef")
    return f"{_coefficient(run, 'skd.objective.kd_coef')} {kind} + {policy} policy loss" if policy else kind


def kind_of_loss(run: RunRecord) -> str | None:
    """The loss in words, with the options that make its values another quantity."""
    kind = run.option("skd.loss.kind")
    if not kind:
        return None
    words = [str(kind)]
    if replaced := run.option("skd.loss.replaced_kind"):
        words.append(f"({replaced} on replaced tokens)")
    if run.text("skd.loss.regions") not in (None, "[]"):  # a list is text by now
        words.append("(others in regions)")
    if (tau := run.option("skd.loss.temperature")) not in (None, 1, 1.0):
        words.append(f"at temperature {tau}")
    if (by := run.option("skd.loss.reweight.by")) not in (None, "none"):
        words.append(f"weighted by {by}")
    return " ".join(words)


def _coefficient(run: RunRecord, name: str) -> Any:
    """A number, or the word for one that follows a schedule (which is a section with options of its own)."""
    return "scheduled" if any(key.startswith(f"{name}.") for key in run.config) else run.option(name)


def teachers_prompt(run: RunRecord) -> str:
    """What the teacher reads beside the student's prompt, part by part; empty where it reads that alone."""
    prefix = "skd.teacher.prompt."
    parts = {name.removeprefix(prefix): run.text(name) for name in run.config if name.startswith(prefix)}
    return "; ".join(f"{part}: {text}" for part, text in parts.items() if text is not None and part != "max_len")


def state(run: RunRecord) -> str:
    stage, planned = run.stage, run.planned_steps
    steps = f"{run.steps} of {planned}" if planned and planned != run.steps else str(run.steps)
    return f"{steps} steps" + ("" if stage == "done" else f", unfinished ({stage or 'stage unknown'})")


def tiles(run: RunRecord) -> list[Tile]:
    """The few numbers that one wants to know of a run; one whose metric is missing is left out."""
    found = []
    for metric in metrics_of([run]):
        if metric.name.startswith("eval/") and last_part(metric.name) in (*SCORES, "kl"):
            values = run.curves[metric.name][1]
            teacher = run.curves.get(teacher_line(metric.name) or "")
            note = f"from {number(values[0], metric)}" if len(values) > 1 else ""
            note += f"; teacher {number(teacher[1][-1], metric)}" if teacher else ""
            found.append(Tile(metric.title, number(values[-1], metric), note.removeprefix("; ")))
        elif metric.name in ("skd/accept_rate", "skd/loss"):
            values = run.curves[metric.name][1]
            found.append(Tile(metric.title, number(values[-1], metric), f"from {number(values[0], metric)}"))
    seconds, tokens = spent(run)
    if seconds > 0:
        found.append(Tile("Training time", duration(seconds), f"{tokens / seconds:,.0f} response tokens/s"))
    return found


def spent(run: RunRecord) -> tuple[float, float]:
    """Seconds of all steps, evaluations and start not counted, and response tokens sampled in them."""
    step_time, speed = run.curves.get("time/step"), run.curves.get("tokens_per_s")
    if not step_time or not speed:
        return 0.0, 0.0
    speeds = dict(zip(*speed, strict=True))
    return sum(step_time[1]), sum(t * speeds.get(step, 0.0) for step, t in zip(*step_time, strict=True))


def comparison(runs: list[RunRecord], metrics: list[Metric]) -> list[tuple[Metric, list[Cell | None]]]:
    """A row a metric: last and best value of each run; None where a run has none."""
    return [(metric, _row(runs, metric)) for metric in metrics]


def kinds_of_loss(runs: list[RunRecord]) -> set[str]:
    return {kind for run in runs if (kind := kind_of_loss(run))}


def _row(runs: list[RunRecord], metric: Metric) -> list[Cell | None]:
    series = [run.curves.get(metric.name) for run in runs]
    bests = [_best(own, metric) if own else None for own in series]
    comparable = len(runs) > 1 and (metric.name != "skd/loss" or len(kinds_of_loss(runs)) == 1)
    best_lead = _lead([best[1] for best in bests if best], metric) if comparable else None
    last_lead = _lead([own[1][-1] for own in series if own], metric) if comparable else None
    return [
        None if own is None else _cell(own[1][-1], best, metric, last_lead, best_lead)
        for own, best in zip(series, bests, strict=True)
    ]


def _cell(
    last: float, best: tuple[int, float] | None, metric: Metric, last_lead: float | None, best_lead: float | None
) -> Cell:
    if best is None:
        return Cell(number(last, metric), last_leads=last == last_lead)
    step, value = best
    return Cell(number(last, metric), f"{number(value, metric)} at step {step}", last == last_lead, value == best_lead)


def _lead(values: list[float], metric: Metric) -> float | None:
    """The best of them; None where they are all the same, or no direction is the better one."""
    if metric.better is None or len(set(values)) < 2:
        return None
    return max(values) if metric.better == "high" else min(values)


def differing_settings(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """Options on which the runs do not agree. Places inside the run folder count as equal."""
    shown = [settings(run) for run in runs]
    names = list(dict.fromkeys(name for options in shown for name in options))
    rows = [(name, [options.get(name, ABSENT) for options in shown]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def settings(run: RunRecord) -> dict[str, str]:
    """Every option as text, keys and tokens hidden, the run folder written as RUN."""
    folder = run.text("skd.run_dir")
    shown = {}
    for name, value in run.config.items():
        text = ABSENT if value is None else str(value)
        if folder and isinstance(value, str) and (value == folder or value.startswith(f"{folder}/")):
            text = "RUN" + value[len(folder) :]
        shown[name] = HIDDEN if value is not None and SECRET.search(name) else text
    return shown


def number(value: float, metric: Metric | None = None) -> str:
    if metric and metric.percent and abs(value) < MOST_WRITTEN_OUT:
        return f"{100 * value + 1e-9:.1f}\u00a0%"  # a half goes up, as in charts.js; no line ends at this space
    if value == 0 or 1000 <= abs(value) < MOST_WRITTEN_OUT:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def _best(series: Series, metric: Metric) -> tuple[int, float] | None:
    """(step, value), the first one of equals."""
    if metric.better is None:
        return None
    return (max if metric.better == "high" else min)(zip(*series, strict=True), key=lambda pair: pair[1])
