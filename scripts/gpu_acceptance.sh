#!/usr/bin/env bash
# Everything that no GPU has run yet, in one go of about a quarter of an hour, into one file for an issue:
#   bash scripts/gpu_acceptance.sh                  on one GPU or more, without a network -> gpu_acceptance.md
#   bash scripts/gpu_acceptance.sh --hub            SmolLM2-360M teaches SmolLM2-135M, from the Hub, in place of the tiny pair
#   bash scripts/gpu_acceptance.sh --only law       some stages (--list names them)
#   bash scripts/gpu_acceptance.sh --cpu            a rehearsal without a GPU, of the stages that a CPU can run
# Exit status: 0 all is well, 1 a stage failed, 2 there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # a run starts five processes that import thousands of modules each
exec python scripts/gpu_acceptance.py "$@"
