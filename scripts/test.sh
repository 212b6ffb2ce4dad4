#!/usr/bin/env bash
# Tests, in the environment of the quickstart.
#   bash scripts/test.sh                       all of them
#   bash scripts/test.sh PYTEST_ARGUMENTS      some of them
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
if [ ! -e .venv/triton ]; then # where tests/kernels look for it: a gigabyte, of no use to anything else without a GPU
    python=${PYTHON:-python3.11}
    command -v "$python" >/dev/null || python=python3
    source scripts/uv.sh
    "${uv[@]}" pip install --quiet --python .venv --no-deps --target .venv/triton triton==3.9.0
fi
export PYTHONDONTWRITEBYTECODE= # a run starts five processes that import thousands of modules each: keep what is compiled
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"

# Whole runs mostly wait, for processes that start and for each other: beside one another and beside the other tests they
# take less. Those that look at what one run leaves behind share it. What the others say comes at the end.
log=$(mktemp -d)
jobs=()
trap 'kill "${jobs[@]}" 2>/dev/null || true; rm -rf "$log"' EXIT
beside() {
    .venv/bin/python -m pytest -o cache_dir=".pytest_cache/$1" "${@:2}" >"$log/$1" 2>&1 &
    jobs+=($!)
}
one_run=(tests/e2e/test_{resume,sources,tasks,train}.py)
beside contract tests/contract
beside engine tests/engine
beside others --ignore tests/e2e --ignore tests/contract --ignore tests/engine --ignore tests/kernels
beside kernels tests/kernels
beside one_run "${one_run[@]}"
status=0
.venv/bin/python -m pytest tests/e2e "${one_run[@]/#/--ignore=}" || status=$?
for job in "${jobs[@]}"; do wait "$job" || status=$?; done
cat "$log"/*
exit "$status"
