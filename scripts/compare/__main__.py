"""Trains every run of a plan, then writes tables and figures. See scripts/compare.sh."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from adaptivity import measure_adaptivity
from collect import read_csv, runs_table, write_csv
from execute import execute
from figures import draw_adaptivity, draw_comparison, draw_cost, draw_sweep
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
    own = parser.parse_args()
    try:
        plan = load_plan(own.plan).only(own.cells, own.seeds)
        failed = []
        if not own.draw:
            failed = execute(plan.runs(), own.runs.resolve(), own.jobs)
            measure(plan, own.runs.resolve(), own.out)
        draw(plan, own.out)
    except RecipeError as error:
        print(f"scripts/compare.sh: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    return 1 if failed else 0


def measure(plan: Plan, folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", runs_table(plan, folder))
    write_csv(out / "adaptivity.csv", measure_adaptivity(plan, folder))


def draw(plan: Plan, out: Path) -> None:
    """From what `measure` wrote, and nothing else."""
    table, adaptivity = read_csv(out / "runs.csv"), read_csv(out / "adaptivity.csv")
    if not table:
        raise RecipeError(f"there is nothing to draw: {out / 'runs.csv'} has no runs")
    draw_comparison(plan, table, out / "comparison.png")
    draw_cost(plan, table, out / "cost.png")
    draw_sweep(plan, table, out / "sweep.png")
    draw_adaptivity(plan, adaptivity, out / "adaptivity.png")
    write_page(plan, table, out / "README.md")
    print(f"The results are in {out}")


if __name__ == "__main__":
    sys.exit(main())
