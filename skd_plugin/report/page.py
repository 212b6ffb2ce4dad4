"""The page: tables from a template, curves and traces as data for the scripts beside it."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from skd_plugin.core.metrics import Metric
from skd_plugin.report import tables
from skd_plugin.report.curves import FIRST, evaluated, metrics_of, shown_first, teacher_line
from skd_plugin.report.pieces import Piece
from skd_plugin.report.run_record import RunRecord
from skd_plugin.report.traces import PackedTraces, corrections
from skd_plugin.words import short_name

ASSETS = resources.files("skd_plugin.report") / "assets"
SCRIPTS = ("uPlot.iife.min.js", "page.js", "charts.js", "traces.js")
STYLES = ("uPlot.min.css", "style.css")
MOST_FREQUENT = 12


def render(runs: list[RunRecord], traces: PackedTraces, notes: list[str]) -> str:
    """The whole page. Args: notes: what holds for the runs together."""
    metrics = metrics_of(runs)
    scripts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"short": short_name, "number": tables.number, "piece": visible}
    page = environment.from_string((ASSETS / "page.html").read_text(encoding="utf-8"))
    return page.render(
        title=", ".join(run.name for run in runs),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        policy=_policy(scripts),
        styles=[Markup((ASSETS / name).read_text(encoding="utf-8")) for name in STYLES],
        scripts=[Markup(script) for script in scripts],
        runs=runs,
        notes=notes,
        tables=tables,
        rows=tables.comparison(runs, metrics),
        differing=tables.differing_settings(runs) if len(runs) > 1 else [],
        corrections=[corrections(traces, number, MOST_FREQUENT) for number in range(len(runs))],
        curves=_curve_data(runs, metrics),
        num_traces=len(traces.per_trace),
        num_tokens=sum(row["length"] for row in traces.per_trace),
        blob=traces.blob() if traces.per_trace else "",
    )


def visible(piece: Piece) -> str:
    """A piece with its white space to be seen, in the signs that traces.js uses."""
    if not isinstance(piece, str):
        return "".join(f"⟨{byte:02X}⟩" for byte in piece)
    return piece.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def _policy(scripts: list[str]) -> str:
    """No request of any kind, and no script but these, whatever text the page holds."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'"


def _curve_data(runs: list[RunRecord], metrics: list[Metric]) -> dict[str, Any]:
    teachers = {teacher_line(metric.name) for metric in metrics}
    return {
        "first": shown_first(metrics),
        "metrics": [
            {
                "name": metric.name,
                "title": metric.title,
                "about": metric.about,
                "percent": metric.percent,
                "teacher": teacher_line(metric.name),
                "points": evaluated(metric.name) is not None,
                "zero": evaluated(metric.name) in FIRST,
            }
            for metric in metrics
            if metric.name not in teachers
        ],
        "runs": [
            {
                "name": run.name,
                "seconds": _seconds(run),
                "series": {
                    name: [steps, [float(f"{value:.5g}") for value in values]]
                    for name, (steps, values) in run.curves.items()
                },
            }
            for run in runs
        ],
    }


def _seconds(run: RunRecord) -> list[list[float]]:
    """Steps, and the seconds that all steps up to each have taken."""
    steps, values = run.curves.get("time/step", ([], []))
    total, sums = 0.0, []
    for value in values:
        total += max(value, 0.0)  # a step takes no less than no time, whatever a file says
        sums.append(round(total, 2))
    return [[0, *steps], [0.0, *sums]]
