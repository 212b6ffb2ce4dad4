#!/usr/bin/env bash
#SBATCH --job-name=skd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Trains a recipe on Slurm's nodes, with a Ray cluster of its own. From the repository's root, which all nodes see:
#   sbatch --nodes=2 scripts/launch_slurm.sh RECIPE.yaml [key=value ...]
# Options of sbatch (--partition, --account, --time, ...) go in front of the script. The environment must be active, or
# in .venv. Two minutes before its time is over the job goes back into the queue. It then goes on from the last
# checkpoint (openrlhf.ckpt.save_steps), as it does where Slurm itself requeues it, and the same command given again.
#   RAY_PORT      of the head (default 6379)
#   NODES_S       seconds to wait for all nodes (default 600)
#   DRY_RUN=1     print the commands only; also outside of Slurm
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -e scripts/launch_job.sh ] || { echo "launch_slurm.sh: run sbatch in the repository's root, not in $PWD" >&2; exit 2; }
[ $# -gt 0 ] || { echo "usage: sbatch [--nodes=N] scripts/launch_slurm.sh RECIPE.yaml [key=value ...]" >&2; exit 2; }
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
port=${RAY_PORT:-6379}
count=${SLURM_JOB_NUM_NODES:-2}

if [ -n "${DRY_RUN:-}" ]; then
    head=HEAD
else
    read -r head < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?run this with sbatch}") # this script runs on it
fi
on_node=(srun --overlap --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}") # else srun gives Ray one CPU
start_head=("${on_node[@]}" --nodes=1 --nodelist="$head" ray start --head --block --port="$port" --disable-usage-stats)
start_others=("${on_node[@]}" --nodes=$((count - 1)) --exclude="$head" ray start --block --address="$head:$port")
submit=(bash scripts/launch_job.sh "$@")
export SUBMISSION_ID=slurm-${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}
# Ray listens on all interfaces; it takes work only from who has this token, which srun hands to all nodes.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${start_head[@]}" && echo
    [ "$count" -eq 1 ] || { printf '%q ' "${start_others[@]}" && echo; }
    exec "${submit[@]}"
fi

steps=() # process ids of what runs in the background
clean_up() {
    trap - EXIT USR1 TERM INT
    # The training first: what Ray starts for a job outlives it where Slurm does not track processes by cgroups.
    [ -z "${job:-}" ] || timeout 60 ray job stop "$SUBMISSION_ID" || true
    kill $(jobs -p) 2>/dev/null || true # srun ends Ray, and Ray its workers, on every node
    wait
}
requeue() {
    echo "launch_slurm.sh: time is over; back into the queue"
    clean_up
    scontrol requeue "$SLURM_JOB_ID"
    exit 1
}
trap clean_up EXIT
trap requeue USR1 # and not TERM: what scancel ends must not come back
trap 'exit 143' TERM
trap 'exit 130' INT

"${start_head[@]}" &
steps+=($!)
if [ "$count" -gt 1 ]; then
    "${start_others[@]}" &
    steps+=($!)
fi

nodes_up() {
    python -c "import ray; ray.init('$head:$port', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
}
until [ "$(nodes_up 2>/dev/null || echo 0)" -eq "$count" ]; do
    [ "$SECONDS" -lt "${NODES_S:-600}" ] || { echo "launch_slurm.sh: not all of $count nodes came up" >&2; exit 1; }
    for step in "${steps[@]}"; do
        kill -0 "$step" 2>/dev/null || { echo "launch_slurm.sh: Ray has ended on a node; see above" >&2; exit 1; }
    done
    sleep 5 &
    wait $!
done

job=coming # a signal may come before the next line has its process
"${submit[@]}" & # in the background, because bash hears of a signal only while it waits
job=$!
status=0
wait "$job" || status=$?
job= # has ended by itself
exit "$status"
