#!/usr/bin/env bash
# Tests, in the environment of the quickstart.
#   bash scripts/test.sh                       all of them
#   bash scripts/test.sh PYTEST_ARGUMENTS      some of them
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PYTHONDONTWRITEBYTECODE= # a run starts five processes that import thousands of modules each: keep what is compiled
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"

# Whole runs need both cores for half of their time, and everything else together needs one: beside each other they take
# less. What the others say comes at the end.
log=$(mktemp)
.venv/bin/python -m pytest --ignore tests/e2e >"$log" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null || true; rm -f "$log"' EXIT
status=0
.venv/bin/python -m pytest tests/e2e -o cache_dir=.pytest_cache/e2e || status=$?
wait "$others" || status=$?
cat "$log"
exit "$status"
