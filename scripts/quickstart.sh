#!/usr/bin/env bash
# From nothing to a distilled student on two CPU cores:  bash scripts/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PYTHONDONTWRITEBYTECODE= # a run starts five processes that import thousands of modules each: keep what is compiled
exec .venv/bin/skd train recipes/quickstart.yaml "$@"
