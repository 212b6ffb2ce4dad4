"""Imports point one way, and losses leave the reduction to the host."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import skd_plugin

PACKAGE = Path(skd_plugin.__file__).parent


def imported_modules(file: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def sources(part: str) -> list:
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files, f"skd_plugin/{part} has no source"
    return [pytest.param(file, id=file.relative_to(PACKAGE).as_posix()) for file in files]


@pytest.mark.parametrize("file", sources("core"))
def test_core_needs_only_torch(file):
    for name in imported_modules(file):
        allowed = name.split(".")[0] in {"torch", *sys.stdlib_module_names} or within(name, "skd_plugin.core")
        assert allowed, f"imports {name}"


@pytest.mark.parametrize("file", sources("engine"))
def test_the_engine_does_not_know_the_trainer(file):
    for name in imported_modules(file):
        assert not within(name, "skd_plugin.host") and not within(name, "skd_plugin.cli"), f"imports {name}"


@pytest.mark.parametrize("file", [f for f in sources(".") if "check" not in f.id.split("/")[0]])
def test_nothing_but_the_command_line_knows_the_checks(file):
    """A run is the same with and without them."""
    known = any(within(name, "skd_plugin.check") for name in imported_modules(file))
    assert not known or file.name == "cli.py"


@pytest.mark.parametrize("file", sources("report"))
def test_report_reads_files_only(file):
    for name in imported_modules(file):
        allowed = not within(name, "skd_plugin") or any(
            within(name, f"skd_plugin.{part}")
            for part in ("core", "config.recipe", "errors", "report", "run_folder", "words")
        )
        assert allowed, f"imports {name}"


def test_importing_the_package_is_cheap():
    code = "import json, sys; import skd_plugin; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "ray", "vllm", "transformers", "openrlhf"} & set(json.loads(output))


def test_losses_never_reduce_over_tokens():
    """A mean belongs to the host's `aggregate_loss`, with the token count of the whole step."""
    for node in ast.walk(ast.parse((PACKAGE / "core" / "losses.py").read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"mean", "nanmean"}, f"line {node.lineno}"
