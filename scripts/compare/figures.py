"""The figures of a comparison. Dots are runs, bars the mean over seeds with its 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collect import Row, chosen, known
from differences import differences
from interval import Interval
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from plan import Plan

from skd_plugin.report.plots import COLOURS


def draw_comparison(plan: Plan, table: list[Row], path: Path) -> None:
    """Scores above, divergences below; where training began and where the teacher is stands under each axis, because
    an axis that reaches both would hide what lies between the methods.
    """
    cells, methods = plan.comparison.cells, plan.comparison.methods[::-1]
    figure, grid = _canvas(len(cells), height=0.6 * len(methods) + 2, rows=2)
    for place, cell in enumerate(cells):
        rows = {method: chosen(table, cell, method) for method in methods}
        everything = [run for runs in rows.values() for run in runs]
        for axes, key in zip(grid[:, place], ("score", "kl"), strict=True):
            for row, method in enumerate(methods):
                colour = COLOURS[1] if method == plan.comparison.against else COLOURS[0]
                _dots(axes, [run[key] for run in rows[method]], row, colour)
            axes.set_yticks(range(len(methods)), [plan.methods[m].label for m in methods])
            axes.set_ylim(-0.6, len(methods) - 0.4)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelleft=place == 0)
        score, divergence = grid[:, place]
        score.set_title(cell.replace("/", ", ") + " start", fontsize=10)
        score.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ends = {
            name: f"{name} {100 * Interval.of(values).mean:.1f} %"
            for name, key in (("start", "score_at_start"), ("teacher", "teacher_score"))
            if (values := known(everything, key))
        }
        score.set_xlabel("\n".join(filter(None, (plan.metric_of(cell), ", ".join(ends.values())))))
        at_start = known(everything, "kl_at_start")
        start = f"\nstart {Interval.of(at_start).mean:.3g}" if at_start else ""
        divergence.set_xlabel(f"KL(p‖q), nats a token{start}")
    figure.savefig(path, dpi=150)


def draw_differences(plan: Plan, table: list[Row], path: Path) -> None:
    """Each method minus the reference, mean over seeds with its paired 95 % interval; filled where it is more than
    chance after the correction.
    """
    cells = plan.comparison.cells
    methods = [method for method in plan.comparison.methods[::-1] if method != plan.comparison.against]
    figure, grid = _canvas(len(cells), height=1.0 * len(methods) + 1.6, rows=2, width=3.6)
    for place, cell in enumerate(cells):
        found = {(one.method, one.key): one for one in differences(plan, table, cell)}
        for axes, key, scale in zip(grid[:, place], ("score", "kl"), (100, 1), strict=True):
            axes.axvline(0, color="black", linewidth=0.8)
            for row, method in enumerate(methods):
                if (one := found.get((method, key))) is None:
                    continue
                colour, interval = COLOURS[0], one.interval
                half = interval.half or 0.0
                face = colour if one.is_clear else "white"
                axes.errorbar(scale * interval.mean, row, xerr=scale * half, color=colour, capsize=3, linewidth=1.5)
                axes.plot(scale * interval.mean, row, "o", color=colour, markerfacecolor=face, markersize=7)
            axes.set_yticks(range(len(methods)), [plan.methods[m].label for m in methods])
            axes.set_ylim(-0.6, len(methods) - 0.4)
            axes.tick_params(labelleft=place == 0)
        reference = plan.methods[plan.comparison.against].label
        grid[0, place].set_title(cell.replace("/", ", ") + " start", fontsize=10)
        grid[0, place].set_xlabel(f"{plan.metric_of(cell)}, points\nminus {reference}")
        grid[1, place].set_xlabel(f"KL, nats a token\nminus {reference}")
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
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(cells), frameon=False, fontsize=8)
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
    accepted.set(xlabel="step", ylabel="accepted proposals, fixed prompts")
    kl.set(xlabel="step", ylabel="KL(p‖q) on them, nats a token")
    accepted.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _canvas(columns: int, height: float, width: float = 2.9, rows: int = 1) -> tuple[Figure, Any]:
    """The axes as an array [rows, columns], or [columns] of a single row."""
    figure = Figure(figsize=(width * columns + 1.2, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid if rows > 1 else grid[0]
