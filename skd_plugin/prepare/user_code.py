"""Python files of the user's that OpenRLHF will load: a reward function, an agent. They are read here and not run."""

from __future__ import annotations

import ast
from pathlib import Path

from skd_plugin.config.host_options import HostOptions
from skd_plugin.errors import RecipeError
from skd_plugin.tasks import reward

WANTED = {"reward.remote_url": "reward_func", "train.agent_func_path": "AgentExecutor"}  # what each must define


def check_user_code(options: HostOptions) -> None:
    """Raises RecipeError for a file that is not there, is no Python, or does not define what OpenRLHF takes of it."""
    for option, wanted in WANTED.items():
        name = str(options.get(option) or "").split(",")[0]
        if option == "train.agent_func_path" and name and not name.endswith(".py"):
            raise RecipeError(f"openrlhf.{option} is '{name}', but must be a .py file with a class {wanted}")
        if not name.endswith(".py") or name == reward.__file__:
            continue  # an address, or none; or the tasks' own
        try:
            tree = ast.parse(Path(name).read_bytes(), name)
        except OSError as error:
            raise RecipeError(f"openrlhf.{option}: {name} cannot be read: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise RecipeError(f"openrlhf.{option}: {name}{line} is no Python: {reason}") from error
        if not _names(tree) & {wanted, "*"}:
            raise RecipeError(f"openrlhf.{option}: {name} defines no {wanted}")


def _names(tree: ast.Module) -> set[str]:
    """What a file may define, wherever in it; "*" for all of another module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
