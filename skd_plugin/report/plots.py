"""The curves of a report as PNG files, one a metric."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from skd_plugin.core.metrics import Metric
from skd_plugin.errors import RecipeError
from skd_plugin.report.curves import SCORES, evaluated, metrics_of, teacher_line
from skd_plugin.report.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#c44e00", "#00795c", "#a0418a", "#6b6b00", "#4a4a4a")  # those of style.css, in its order
LONGEST_NAME = 100  # of a file, without its ending
DASHES = ("-", "--", ":", "-.")


def write_plots(runs: list[RunRecord], folder: Path) -> list[Path]:
    """Raises RecipeError: matplotlib is not installed, or `folder` is a file."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise RecipeError(
            "--png draws with matplotlib, which is not installed: pip install 'skd_plugin[report]'"
        ) from error
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--png: {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    metrics = metrics_of(runs)
    teachers = {teacher_line(metric.name) for metric in metrics}
    written: list[Path] = []
    for metric in metrics:
        if metric.name in teachers:
            continue
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', metric.name)[:LONGEST_NAME]}.png"
        if path in written:  # names that differ in what a file's name does not take
            path = path.with_stem(f"{path.stem}_{len(written)}")
        with rc_context({"text.parse_math": False}):  # a name with "$" in it is no formula
            canvas = Canvas(figsize=(6.4, 4.0), layout="constrained")
            _draw(canvas.subplots(), metric, runs)
            canvas.savefig(path, dpi=150)
        written.append(path)
    return written


def _draw(axes: Axes, metric: Metric, runs: list[RunRecord]) -> None:
    for index, run in enumerate(runs):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        if metric.name in run.curves:
            marker = "o" if evaluated(metric.name) or len(run.curves[metric.name][0]) == 1 else None
            axes.plot(*run.curves[metric.name], dash, color=colour, label=run.name, marker=marker, markersize=4)
        teacher = run.curves.get(teacher_line(metric.name) or "")
        if teacher:
            axes.axhline(teacher[1][-1], color=colour, linewidth=1, dashes=(3, 4), label=f"{run.name}: teacher")
    axes.set(title=metric.title, xlabel="step", ylabel=metric.about or metric.name)
    if metric.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    if evaluated(metric.name) in SCORES:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1 or teacher_line(metric.name):
        axes.legend(frameon=False)
