#!/usr/bin/env bash
# Ways of distilling beside each other, with the same seeds, prompts and number of updates; results/README.md is made so:
#   bash scripts/compare.sh [PLAN.yaml] [--out results] [--runs runs/compare] [--jobs N] [--session N] [--plan] [--draw]
# The same command goes on with what is not done yet. --plan says how long it takes and which differences its seeds can
# show, by the runs that are there already; --draw makes tables and figures again from the CSVs. Neither runs anything.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PYTHONDONTWRITEBYTECODE= # a run starts five processes that import thousands of modules each: keep what is compiled
exec .venv/bin/python scripts/compare "$@"
