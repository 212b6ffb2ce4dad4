#!/usr/bin/env bash
# Qwen3-4B teaches Qwen3-0.6B GSM8K on one node of 8 GPUs, as a Ray job:  bash scripts/train_gsm8k.sh [key=value ...]
#
# Several nodes: install on each, in the same place, and keep run folder and model cache on a disk that all of them see.
#   on the first:   ray start --head --num-gpus 8
#   on the others:  ray start --address FIRST_NODE:6379 --num-gpus 8
#   on the first:   bash scripts/train_gsm8k.sh openrlhf.actor.num_nodes=2 openrlhf.vllm.num_engines=8 \
#                       openrlhf.rollout.batch_size=16 openrlhf.train.batch_size=16   (2 x 4 actors, 2 responses each)
#
# RUNTIME_ENV is Ray's runtime environment as JSON, e.g. RUNTIME_ENV='{"env_vars": {"HF_HOME": "/shared/hf"}}'
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
runtime_env=${RUNTIME_ENV:-'{}'}

ray status >/dev/null 2>&1 || ray start --head --num-gpus 8 --disable-usage-stats

# Absolute paths, because a Ray job does not start in this folder.
exec ray job submit --address=http://127.0.0.1:8265 --runtime-env-json="$runtime_env" -- \
    "$(command -v skd)" train "$PWD/recipes/gsm8k-qwen3-0.6b-from-4b-8gpu.yaml" \
    skd.run_dir="$PWD/runs/gsm8k-qwen3" "$@"
