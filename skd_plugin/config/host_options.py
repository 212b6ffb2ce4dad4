"""OpenRLHF's own options: its parser, and a recipe's `openrlhf:` section as its command line."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from skd_plugin.config.recipe import flatten
from skd_plugin.errors import RecipeError, unknown_key

HOST_MODULE = "openrlhf.cli.train_ppo_ray"

HostOptions = Mapping[str, Any]  # options of OpenRLHF by their dotted names, which are its own, and of any type


class _Parser(argparse.ArgumentParser):
    """argparse exits the process on a bad value; a recipe check must raise."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"openrlhf: {message}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise RecipeError("openrlhf: a value among several that reads like a flag")


def host_parser() -> argparse.ArgumentParser:
    """OpenRLHF's argument parser, built from its source: it stands under `if __name__ == "__main__"`, where it cannot
    be imported, and importing the module costs ten seconds of vLLM and DeepSpeed.

    Raises:
        RuntimeError: OpenRLHF's script no longer has the form that this reads.
    """
    declarations, _ = _around_parsing()
    namespace: dict[str, Any] = {"argparse": SimpleNamespace(ArgumentParser=_Parser), "datetime": datetime}
    exec(compile(ast.Module(declarations, type_ignores=[]), HOST_MODULE, "exec"), namespace)
    return namespace["parser"]


def host_defaults() -> dict[str, Any]:
    """OpenRLHF's own value of every option of it."""
    return {action.dest: action.default for action in host_parser()._actions if action.dest != "help"}


def check_by_host(arguments: list[str]) -> None:
    """The checks between options that OpenRLHF makes after parsing, run from its source before anything is started.

    Raises:
        RecipeError: with OpenRLHF's own words.
    """
    from contextlib import redirect_stdout
    from io import StringIO

    _, rest = _around_parsing()
    # Neither its imports nor its call of train().
    checks: list[ast.stmt] = [node for node in rest if isinstance(node, ast.If | ast.Assert | ast.Assign)]
    namespace = {"args": host_parser().parse_args(arguments), "hierarchize": hierarchize}
    try:
        with redirect_stdout(StringIO()):  # its warnings are repeated in the run's log
            exec(compile(ast.Module(checks, type_ignores=[]), HOST_MODULE, "exec"), namespace)
    except AssertionError as error:
        raise RecipeError(f"openrlhf: {error}") from error


def hierarchize(args: argparse.Namespace) -> SimpleNamespace:
    """OpenRLHF's function of this name, by its file: an import of it would bring DeepSpeed with it."""
    root = importlib.util.find_spec("openrlhf")
    if root is None or root.origin is None:
        raise RuntimeError("openrlhf is not installed; run scripts/install.sh")
    spec = importlib.util.spec_from_file_location("openrlhf_config", Path(root.origin).parent / "utils" / "config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hierarchize(args)


@cache
def _around_parsing() -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The statements of OpenRLHF's script before it parses its arguments, and those after.

    Raises:
        RuntimeError: OpenRLHF's script no longer has the form that this reads.
    """
    body = _main_body()
    place = next((i for i, node in enumerate(body) if "parse_args" in ast.dump(node)), None)
    if place is None:
        raise RuntimeError(f"{HOST_MODULE} no longer calls parse_args under __main__; see skd_plugin/config")
    return body[:place], body[place + 1 :]


def _main_body() -> list[ast.stmt]:
    spec = importlib.util.find_spec(HOST_MODULE)
    if spec is None or spec.origin is None:
        raise RuntimeError("openrlhf is not installed; run scripts/install.sh")
    tree = ast.parse(Path(spec.origin).read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
            return node.body
    raise RuntimeError(f"{HOST_MODULE} no longer has an `if __name__ == '__main__'` block; see skd_plugin/config")


def host_arguments(section: HostOptions, parser: argparse.ArgumentParser) -> list[str]:
    """The `openrlhf:` section as a command line of OpenRLHF.

    Raises:
        RecipeError: an unknown option (the nearest one is named) or a value that OpenRLHF's parser refuses.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    arguments: list[str] = []
    for key, value in flatten(section).items():
        if key not in actions:
            raise RecipeError(f"openrlhf: {unknown_key(key, actions)}")
        arguments += _one_option(key, value, actions[key], parser)
    parser.parse_args(arguments)
    return arguments


def host_values(section: HostOptions, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options with the types that OpenRLHF's parser gives them, whatever YAML made of them (1e-6 is a text there).
    Unknown ones and switches stay as they are.

    Raises:
        RecipeError: a value that the parser refuses.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.nargs != 0}
    typed = {}
    for key, value in flatten(section).items():
        if key not in actions:
            typed[key] = value
        elif value is not None:  # null is OpenRLHF's own default
            typed[key] = vars(parser.parse_args(_one_option(key, value, actions[key], parser)))[key]
    return typed


def _one_option(key: str, value: Any, action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise RecipeError(f"openrlhf: '{key}' is a switch; got {value!r}, expected true or false")
        return _switch(key, value, parser)
    values = [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{key}={values[0]}"]  # else argparse takes it for a flag
    return [f"--{key}", *values]


def _switch(key: str, value: bool, parser: argparse.ArgumentParser) -> list[str]:
    """The flag, of those that set `key`, which gives it this value; none where it is the default."""
    if parser.get_default(key) == value:
        return []
    for action in parser._actions:
        if action.dest == key and action.nargs == 0 and getattr(action, "const", None) == value:
            return [action.option_strings[0]]
    raise RecipeError(f"openrlhf: OpenRLHF has no way to set '{key}' to {value}")
