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

# uv reads its own variables only: hand it what pip has been told, by variable or by its configuration files.
pip_setting() {
    local name=PIP_$(tr a-z- A-Z_ <<<"$1")
    local value=${!name-$("$python" -m pip config get "global.$1" 2>/dev/null || true)}
    tr -s ' \n' ' ' <<<"$value" | sed 's/^ //; s/ $//'
}
find_links=$(pip_setting find-links) index=$(pip_setting index-url) extra=$(pip_setting extra-index-url)
[ -z "$find_links" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-${find_links// /,}}
[ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
[ -z "$extra" ] || export UV_INDEX=${UV_INDEX:-$extra}
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # as pip does: the best version of all indexes
export UV_LINK_MODE=${UV_LINK_MODE:-copy} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}

uv=(uv)
if ! command -v uv >/dev/null; then
    "$python" -m pip install --quiet uv 2>/dev/null || "$python" -m pip install --quiet --user --break-system-packages uv
    uv=("$python" -m uv)
fi
# A torch wheel on this disk is used; else the CPU build is asked for by name, or a CUDA build of 3 GB would come.
backend=(--torch-backend cpu)
for folder in ${find_links}; do
    compgen -G "${folder#file://}/torch-2.13.0+cpu-*.whl" >/dev/null && backend=()
done

[ -d .venv ] || "${uv[@]}" venv --quiet --python "$python" .venv
"${uv[@]}" pip install --quiet --python .venv --no-deps "${backend[@]}" -r requirements/cpu.txt
"${uv[@]}" pip install --quiet --python .venv --no-deps --editable .
touch "$stamp"
