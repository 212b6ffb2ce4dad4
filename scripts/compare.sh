#!/usr/bin/env bash
# Ways of distilling beside each other, with the same seeds, prompts and number of updates; results/README.md is made so:
#   bash scripts/compare.sh [PLAN.yaml] [--out results] [--runs runs/compare] [--jobs N] [--draw]
# The same command goes on with what is not done yet; --draw makes tables and figures again from the CSVs, and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PYTHONDONTWRITEBYTECODE= # a run starts five processes that import thousands of modules each: keep what is compiled
exec .venv/bin/python scripts/compare "$@"
