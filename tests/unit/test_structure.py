"""Imports point one way: each part of the package names those that it may import, each library has its importers."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import skd_plugin

PACKAGE = Path(skd_plugin.__file__).parent

# Part (a folder or a file of the package) -> the parts that it imports; nothing else may be imported.
IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "seams": set(),
    "trust": {"errors", "seams"},
    "words": set(),
    "damage": {"words"},
    "terminal": set(),
    "run_folder": {"errors"},
    "cpu": {"seams"},
    "core": set(),
    "tasks": {"damage", "errors", "words"},
    "models": {"errors", "words", "trust"},
    "quantization": set(),
    "adapters": {"errors", "models", "trust", "words"},
    "config": {"core", "errors", "run_folder"},
    "served": {"config", "core", "errors", "words"},
    "engine": {"config", "core", "cpu", "models", "seams", "served"},
    "host": {
        "adapters",
        "config",
        "core",
        "cpu",
        "engine",
        "errors",
        "models",
        "run_folder",
        "seams",
        "served",
        "tasks",
        "trust",
    },
    "prepare": {
        "adapters",
        "config",
        "damage",
        "errors",
        "host",
        "models",
        "quantization",
        "run_folder",
        "served",
        "tasks",
        "words",
        "trust",
    },
    "run": {"config", "errors", "run_folder", "terminal", "words"},
    "report": {"config", "core", "errors", "run_folder", "terminal", "words"},
    "rollout_command": {
        "adapters",
        "config",
        "engine",
        "errors",
        "host",
        "prepare",
        "run_folder",
        "served",
        "tasks",
        "terminal",
    },
    "evaluate": {
        "adapters",
        "config",
        "core",
        "engine",
        "errors",
        "host",
        "models",
        "prepare",
        "run",
        "run_folder",
        "tasks",
        "terminal",
        "words",
    },
    "check": {
        "adapters",
        "config",
        "core",
        "cpu",
        "engine",
        "errors",
        "host",
        "models",
        "prepare",
        "quantization",
        "run",
        "run_folder",
        "terminal",
        "words",
        "trust",
    },
    "cli": {"check", "config", "errors", "evaluate", "prepare", "report", "rollout_command", "run", "terminal"},
}
# (part, part below) -> the files there that it may import, where not all of them.
ONLY = {
    ("prepare", "host"): {"prompts", "teacher_prompts"},  # OpenRLHF's own form of a prompt, and the teacher's
    ("rollout_command", "host"): {"prompts", "teacher_prompts"},
    ("evaluate", "host"): {"prompts", "teacher_prompts"},
    ("report", "config"): {"recipe", "yaml_text"},  # a report needs no schema: it shows what a run folder says
}
# Library -> the parts that may import it.
LIBRARIES = {
    "vllm": {"engine", "evaluate"},
    "openrlhf": {"host"},
    "deepspeed": {"host"},
    "ray": {"host"},
    "peft": {"adapters"},
    "httpx": {"served"},
    "google": {"served"},
    "triton": {"engine"},
}


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


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [
    pytest.param(file, id=file.relative_to(PACKAGE).as_posix())
    for file in sorted(PACKAGE.rglob("*.py"))
    if part_of(file) != "__init__"
]


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    assert part in IMPORTS, f"say in IMPORTS what {part} may import"
    for name in imported_modules(file):
        top, *inner = name.split(".")
        if top != "skd_plugin" or not inner or inner[0] == part:
            continue
        assert inner[0] in IMPORTS[part], f"{part} imports {name}"
        only = ONLY.get((part, inner[0]))
        assert only is None or len(inner) == 1 or inner[1] in only, f"{part} imports {name}"


def test_no_arrow_runs_up() -> None:
    """The table has an order in which each part imports only those before it."""
    left = dict(IMPORTS)
    while left:
        ground = {part for part, below in left.items() if not below & left.keys()}
        assert ground, f"these import each other in a circle: {sorted(left)}"
        left = {part: below for part, below in left.items() if part not in ground}


@pytest.mark.parametrize("file", FILES)
def test_each_library_has_its_importers(file: Path) -> None:
    for name in imported_modules(file):
        allowed = LIBRARIES.get(name.split(".")[0])
        assert allowed is None or part_of(file) in allowed, f"imports {name}; only {allowed} may"


@pytest.mark.parametrize("file", [f for f in FILES if f.id.startswith("core/")])
def test_core_needs_only_torch(file: Path) -> None:
    for name in imported_modules(file):
        allowed = name.split(".")[0] in {"torch", *sys.stdlib_module_names} or name.startswith("skd_plugin.core")
        assert allowed, f"imports {name}"


def test_importing_the_package_is_cheap() -> None:
    code = "import json, sys; import skd_plugin; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "ray", "vllm", "transformers", "openrlhf"} & set(json.loads(output))


SCRIPTS = PACKAGE.parent / "scripts"


@pytest.mark.parametrize("file", [*FILES, *(pytest.param(f, id=f.name) for f in sorted(SCRIPTS.rglob("*.py")))])
def test_no_console_reads_markup(file: Path) -> None:
    """All print by the console of terminal.py, and wait by its spinner, whose text is markup to rich."""
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = {getattr(func, "attr", getattr(func, "id", "")) for func in calls}
    assert file.name == "terminal.py" or not names & {"Console", "status", "from_markup"}
    assert file.name == "terminal.py" or "rich.status" not in imported_modules(file)


def test_losses_never_reduce_over_tokens() -> None:
    """A mean belongs to OpenRLHF's `aggregate_loss`, with the token count of the whole step."""
    for node in ast.walk(ast.parse((PACKAGE / "core" / "losses.py").read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"mean", "nanmean"}, f"line {node.lineno}"
