"""Registry of the tasks that `skd.task.name` can name."""

from __future__ import annotations

from skd_plugin.tasks.arithmetic import Arithmetic
from skd_plugin.tasks.base import Example, Task

TASKS: dict[str, type[Task]] = {Arithmetic.name: Arithmetic}

__all__ = ["TASKS", "Example", "Task"]
