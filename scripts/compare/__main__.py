"""Trains every run of a plan, then writes tables and figures. See scripts/compare.sh."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from adaptivity import measure_adaptivity
from collect import Row, curves_table, read_csv, runs_table, write_csv
from differences import smallest
from execute import execute, is_done
from figures import draw_adaptivity, draw_comparison, draw_cost, draw_differences, draw_sweep
from finished import measure_finished
from page import write_page
from plan import ROOT, Plan, load_plan

from skd_plugin.errors import RecipeError


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/compare.sh", description=__doc__)
    parser.add_argument("plan", nargs="?", type=Path, default=ROOT / "recipes" / "compare" / "plan.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="tables and figures (default: results)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare", help="run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on its own cores")
    parser.add_argument("--cells", nargs="+", metavar="TASK/START", help="only these, e.g. arithmetic/cold")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the plan's")
    parser.add_argument(
        "--draw", action="store_true", help="tables and figures from the CSVs in --out; nothing is run"
    )
    parser.add_argument("--session", type=int, default=20, metavar="N", help="runs that share one engine, at most")
    parser.add_argument(
        "--plan",
        dest="plan_only",
        action="store_true",
        help="say what would be run, how long it would take and which differences it can show; nothing is run",
    )
    parser.add_argument("--pilot", type=Path, help="CSV of earlier runs, for --plan (default: runs.csv in --out)")
    own = parser.parse_args()
    try:
        plan = load_plan(own.plan).only(own.cells, own.seeds)
        failed = []
        if own.plan_only:
            foresee(plan, own.runs.resolve(), read_csv(own.pilot or own.out / "runs.csv"), own.jobs)
            return 0
        if not own.draw:
            failed = execute(plan.runs(), own.runs.resolve(), own.jobs, own.session)
            measure(plan, own.runs.resolve(), own.out)
        draw(plan, own.out)
    except RecipeError as error:
        print(f"scripts/compare.sh: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    return 1 if failed else 0


def foresee(plan: Plan, folder: Path, pilot: list[Row], jobs: int) -> None:
    """What is still to run and for how long, and the smallest difference to the reference that the seeds can show."""
    runs = plan.runs()
    left = [run for run in runs if not is_done(run, folder)]
    print(f"{len(runs)} runs, {len(left)} of them to be run")
    alike = [row for row in pilot if f"{row['task']}/{row['start']}" in plan.comparison.cells]
    if alike:
        seconds = sum(row["rollout_s"] + row["train_s"] for row in alike) / len(alike)
        print(f"about {len(left) * seconds / jobs / 60:.0f} min of sampling and training, as long as the pilot's")
    for cell in plan.comparison.cells:
        score, kl = smallest(plan, pilot, cell, "score"), smallest(plan, pilot, cell, "kl")
        if score is None or kl is None:
            print(f"{cell}: no pilot with two seeds, so nothing can be said of its power")
        else:
            print(
                f"{cell}: {len(plan.seeds)} seeds find differences to {plan.comparison.against} of {100 * score:.1f} "
                f"points of {plan.metric_of(cell)}, or {kl:.4f} nats of KL, four times in five"
            )


def measure(plan: Plan, folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", runs_table(plan, folder))
    write_csv(out / "curves.csv", curves_table(plan, folder))
    write_csv(out / "adaptivity.csv", measure_adaptivity(plan, folder))
    write_csv(out / "finished.csv", measure_finished(plan, folder))


def draw(plan: Plan, out: Path) -> None:
    """From what `measure` wrote, and nothing else."""
    table, adaptivity = read_csv(out / "runs.csv"), read_csv(out / "adaptivity.csv")
    if not table:
        raise RecipeError(f"there is nothing to draw: {out / 'runs.csv'} has no runs")
    draw_differences(plan, table, out / "differences.png")
    draw_comparison(plan, table, out / "comparison.png")
    draw_cost(plan, table, out / "cost.png")
    draw_sweep(plan, table, out / "sweep.png")
    draw_adaptivity(plan, adaptivity, out / "adaptivity.png")
    write_page(plan, table, read_csv(out / "curves.csv"), read_csv(out / "finished.csv"), out / "README.md")
    print(f"The results are in {out}")


if __name__ == "__main__":
    sys.exit(main())
