#!/usr/bin/env bash
# Makes .venv with the pinned set for a machine without GPU. Does nothing where that has been done before.
#   bash scripts/install.sh            needs Python 3.11; takes uv from pip if there is none
# pip's own settings for indexes and wheel folders hold for uv too, so that a local CPU wheel of torch is found.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "install.sh: Python 3.11 is needed (openrlhf's wheel is built for it); found $("$python" -V). Set PYTHON=" >&2; exit 1; }

stamp=.venv/.installed-$(cat requirements/cpu.txt pyproject.toml | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

source scripts/uv.sh
[ -d .venv ] || "${uv[@]}" venv --quiet --python "$python" .venv
# Compiled here once: a run has five processes, each of which would do it at the first start, or, where
# PYTHONDONTWRITEBYTECODE is set as in many containers, at every start: 122 s to the first step in place of 49.
"${uv[@]}" pip install --quiet --python .venv --no-deps --compile-bytecode "${backend[@]}" -r requirements/cpu.txt
"${uv[@]}" pip install --quiet --python .venv --no-deps --editable .
touch "$stamp"
