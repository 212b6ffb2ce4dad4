# Sourced by install.sh and test_compat.sh, with $python set: $uv is how uv is called, $backend where torch is from.
# It takes uv from pip if there is none.
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
