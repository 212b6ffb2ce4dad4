"""What is imported is declared in pyproject.toml, and the lock holds what is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import skd_plugin

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
LOCK = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE))
NAMES = {"yaml": "pyyaml", "google": "google-api-core"}  # modules that are not called as their distribution
LOCKED = {"cpu", "smollm2", "tasks", "report", "dev"}  # the extras that requirements/cpu.in holds


def distribution(module: str) -> str:
    return canonicalize_name(NAMES.get(module, module))


def third_party(file: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"skd_plugin"}


IMPORTED = {file: third_party(file) for file in Path(skd_plugin.__file__).parent.rglob("*.py")}


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(r.name) for rs in (NEEDED, *EXTRAS.values()) for r in rs}
    missing = {
        f"{name} ({file.name})"
        for file, names in IMPORTED.items()
        for name in names
        if distribution(name) not in declared
    }
    assert not missing, f"not in pyproject.toml: {sorted(missing)}"


def test_every_dependency_is_imported() -> None:
    imported = {distribution(name) for names in IMPORTED.values() for name in names}
    unused = {r.name for r in NEEDED if canonicalize_name(r.name) not in imported}
    assert not unused, f"skd_plugin imports no {sorted(unused)}"


LOCKED_REQUIREMENTS = [*NEEDED, *(r for extra in sorted(LOCKED) for r in EXTRAS[extra])]


@pytest.mark.parametrize("requirement", LOCKED_REQUIREMENTS, ids=str)
def test_the_lock_holds_what_is_declared(requirement: Requirement) -> None:
    pinned = LOCK.get(canonicalize_name(requirement.name))
    assert pinned, f"requirements/cpu.txt has no {requirement.name}"
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_types_travel_with_the_package() -> None:
    assert (Path(skd_plugin.__file__).parent / "py.typed").is_file()
    assert (
        "py.typed"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["skd_plugin"]
    )
