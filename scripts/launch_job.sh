#!/usr/bin/env bash
# Trains a recipe as a job of a Ray cluster that runs already:  bash scripts/launch_job.sh RECIPE.yaml [key=value ...]
#
# On every node: this repository in the same place, the same environment, active. Run folder and model cache
# (HF_HOME) on a disk that all nodes see.
#   on every node:  export RAY_AUTH_MODE=token; `ray get-auth-token --generate` on one, and its ~/.ray/auth_token on all.
#                   Without it whoever reaches Ray's ports runs code on the cluster; this script then warns
#   on the first:   ray start --head
#   on the others:  ray start --address FIRST_NODE:6379
#   on the first:   bash scripts/launch_job.sh recipes/gpu-qwen3-1.7b-from-8b-2nodes.yaml
#   at the end:     ray stop, on every node
#
#   RAY_API_SERVER_ADDRESS   the cluster's dashboard (default http://127.0.0.1:8265)
#   RUNTIME_ENV              Ray's runtime environment as JSON, e.g. '{"env_vars": {"HF_HOME": "/shared/hf"}}'
#   SUBMISSION_ID            name of the job, for `ray job stop NAME` (default: Ray makes one)
#   DRY_RUN=1                print the command only
# Ctrl-C ends the watching, not the job: `ray job stop` does that. The same command goes on with a run that was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: bash scripts/launch_job.sh RECIPE.yaml [key=value ...]" >&2; exit 2; }
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

# `ray job submit` joins the words of a command in a way that a shell reads differently where these occur.
for word in "$@"; do
    case $word in
    *[!A-Za-z0-9_./=:,@%+{}\[\]\ -]*)
        echo "launch_job.sh: a Ray job cannot carry '$word'; put this option into a recipe of your own" >&2
        exit 2
        ;;
    esac
done

[ "${RAY_AUTH_MODE:-}" = token ] || echo "launch_job.sh: this cluster takes work from anybody who reaches its ports;" \
    "start it with RAY_AUTH_MODE=token (docs/security.md)" >&2

# A Ray job starts in a folder of its own, so it is sent back to this one.
skd=$(command -v skd) || { echo "launch_job.sh: there is no 'skd'; pip install -e '.[gpu]' first" >&2; exit 2; }
command=(ray job submit --runtime-env-json="${RUNTIME_ENV:-"{}"}")
[ -z "${SUBMISSION_ID:-}" ] || command+=(--submission-id="$SUBMISSION_ID")
command+=(-- env --chdir="$PWD" "$skd" train "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
