"""Registry of the tasks that `skd.task.name` can name; a task of the user's own is named by its file."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from skd_plugin.tasks.arithmetic import Arithmetic
from skd_plugin.tasks.base import Example, Task, TaskError
from skd_plugin.tasks.dialogsum import DialogSum
from skd_plugin.tasks.flores import Flores
from skd_plugin.tasks.gsm8k import GSM8K
from skd_plugin.tasks.instructions import Instructions
from skd_plugin.tasks.math_problems import ASDiv, GSMPlus, Math500, UltraInteract
from skd_plugin.tasks.multi30k import Multi30k
from skd_plugin.tasks.reasoning_gym import PREFIX, reasoning_gym_task
from skd_plugin.tasks.summary import Summary
from skd_plugin.tasks.translation import Translation

GENERATED = (Arithmetic, Translation, Summary, Instructions)
DATASETS = (GSM8K, Flores, Multi30k, DialogSum, UltraInteract, Math500, GSMPlus, ASDiv)
TASKS: dict[str, type[Task]] = {task.name: task for task in (*GENERATED, *DATASETS)}

__all__ = ["TASKS", "Example", "Task", "TaskError", "find_task"]


@cache
def find_task(name: str) -> type[Task]:
    """Class of a task: one of TASKS, a dataset of reasoning-gym, or the class `TASK` of the Python file `name`.

    Raises:
        KeyError: there is no task of that name.
        TaskError: the file is not there or defines no task; reasoning-gym is not there or has no such dataset.
    """
    if name.endswith(".py"):
        return _class_of(Path(name))
    return reasoning_gym_task(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else TASKS[name]


def _class_of(file: Path) -> type[Task]:
    if not file.is_file():
        raise TaskError(f"there is no task file {file}")
    spec = importlib.util.spec_from_file_location(f"skd_task_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task: Any = getattr(module, "TASK", None)
    missing = [part for part in ("name", "metric", "max_new_tokens", "examples", "score") if not hasattr(task, part)]
    if missing:
        raise TaskError(f"{file}: TASK must be a class with {', '.join(missing)}; see docs/tasks.md")
    return task
