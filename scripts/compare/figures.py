"""The figures of a comparison. Dots are runs, bars the mean over seeds with its 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collect import Row, chosen, known
from interval import Interval
from matplotlib.figure import Figure
from plan import Plan

from skd_plugin.report.plots import COLOURS


def draw_comparison(plan: Plan, table: list[Row], path: Path) -> None:
    cells, methods = plan.comparison.cells, plan.comparison.methods[::-1]
    figure, grid = _canvas(len(cells), height=0.42 * len(methods) + 1.3)
    for place, (axes, cell) in enumerate(zip(grid, cells, strict=True)):
        for row, method in enumerate(methods):
            values = [run["score"] for run in chosen(table, cell, method)]
            _dots(axes, values, row, COLOURS[1] if method == plan.comparison.against else COLOURS[0])
        everything = [run for method in methods for run in chosen(table, cell, method)]
        for key, dash, label in (("score_at_start", ":", "student at the start"), ("teacher_score", "--", "teacher")):
            if values := known(everything, key):
                axes.axvline(Interval.of(values).mean, linestyle=dash, color="0.45", linewidth=1, label=label)
        axes.set_yticks(range(len(methods)), [plan.methods[m].label for m in methods])
        axes.set_title(cell.replace("/", ", "), fontsize=10)
        axes.set_xlabel(plan.metric_of(cell))
        axes.tick_params(labelleft=place == 0)
    grid[0].legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, dpi=150)


def _dots(axes: Any, values: list[float], row: float, colour: str) -> None:
    if not values:
        return
    interval = Interval.of(values)
    axes.plot([interval.mean], [row], "|", color=colour, markersize=16, markeredgewidth=2)
    if interval.half is not None:
        axes.plot(
            [interval.mean - interval.half, interval.mean + interval.half], [row, row], color=colour, linewidth=1.5
        )
    axes.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)


def draw_cost(plan: Plan, table: list[Row], path: Path) -> None:
    """Score over the seconds of roll-outs and updates, a mark a method."""
    cells = plan.comparison.cells
    figure, grid = _canvas(len(cells), height=3.2)
    for axes, cell in zip(grid, cells, strict=True):
        for place, method in enumerate(plan.comparison.methods):
            rows = chosen(table, cell, method)
            if not rows:
                continue
            seconds = Interval.of([row["rollout_s"] + row["train_s"] for row in rows]).mean
            label = plan.methods[method].label
            axes.plot(
                seconds,
                Interval.of([row["score"] for row in rows]).mean,
                "os^DvPX*"[place % 8],
                color=COLOURS[place % len(COLOURS)],
                label=label,
            )
        axes.set_title(cell.replace("/", ", "), fontsize=10)
        axes.set_xlabel("seconds of sampling and training")
        axes.set_ylabel(plan.metric_of(cell))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_sweep(plan: Plan, table: list[Row], path: Path) -> None:
    if plan.sweep is None or not plan.sweep.cells:
        return
    cells, points = plan.sweep.cells, list(plan.sweep.methods.items())
    figure, grid = _canvas(len(cells), height=3.2, width=4.4)
    for axes, cell in zip(grid, cells, strict=True):
        twin = axes.twinx()
        found = [(place, chosen(table, cell, method)) for place, (_, method) in enumerate(points)]
        found = [(place, rows) for place, rows in found if rows]
        places = [place for place, _ in found]
        scores = [Interval.of([row["score"] for row in rows]) for _, rows in found]
        accepted = [Interval.of([row["accepted_last"] for row in rows]).mean for _, rows in found]
        half = [interval.half or 0.0 for interval in scores]
        axes.errorbar(places, [s.mean for s in scores], yerr=half, fmt="o-", color=COLOURS[0], capsize=3)
        twin.plot(places, accepted, "s--", color=COLOURS[1], markersize=4)
        axes.set_xticks(range(len(points)), [value for value, _ in points])
        axes.set_title(cell.replace("/", ", "), fontsize=10)
        axes.set_xlabel(plan.sweep.title)
        axes.set_ylabel(plan.metric_of(cell), color=COLOURS[0])
        twin.set_ylabel("accepted in the last step", color=COLOURS[1])
        twin.set_ylim(-0.02, 1.02)
        twin.spines["top"].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_adaptivity(plan: Plan, rows: list[Row], path: Path) -> None:
    if not rows:
        return
    figure, (accepted, kl) = _canvas(2, height=3.2, width=4.4)
    for place, cell in enumerate(plan.adaptivity.cells):
        task, start = cell.split("/")
        own = [row for row in rows if (row["task"], row["start"]) == (task, start)]
        style = dict(color=COLOURS[place], marker="o", markersize=3, label=f"{task}, {start}")
        accepted.plot([row["step"] for row in own], [row["accepted"] for row in own], **style)
        kl.plot([row["step"] for row in own], [row["kl"] for row in own], **style)
    accepted.set(xlabel="update", ylabel="accepted proposals, fixed prompts")
    kl.set(xlabel="update", ylabel="KL(p‖q) on them, nats a token")
    accepted.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _canvas(count: int, height: float, width: float = 2.9) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * count + 1.2, height), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid)
