#!/usr/bin/env bash
# Trains a recipe on the GPUs of this machine:  bash scripts/launch_node.sh RECIPE.yaml [key=value ...]
# `skd train` starts Ray here and ends it again; the same command goes on with a run that was cut off.
#   DRY_RUN=1   print the command only
#   CHECK=1     `skd check` of the same line first; nothing is trained if a check fails
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: bash scripts/launch_node.sh RECIPE.yaml [key=value ...]" >&2; exit 2; }
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
export RAY_ADDRESS=local # a Ray of its own, which lets nobody else in, and no cluster, which launch_job.sh is for

if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' skd train "$@"
    echo
    exit
fi
[ -z "${CHECK:-}" ] || skd check "$@"
exec skd train "$@"
