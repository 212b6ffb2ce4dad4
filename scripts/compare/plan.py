"""What is compared: a YAML file -> runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from skd_plugin.errors import RecipeError

ROOT = Path(__file__).parents[2]
TASK_SEED = "skd.task.seed"  # of one task; a recipe with several has the same prompts for all seeds
SEEDED = (TASK_SEED, "skd.rollout.seed", "openrlhf.train.seed")


@dataclass(frozen=True)
class Run:
    task: str
    start: str
    method: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]

    @property
    def cell(self) -> str:
        return f"{self.task}/{self.start}"

    @property
    def name(self) -> str:
        return f"{self.task}-{self.start}-{self.method}-seed{self.seed}"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskPlan(Strict):
    recipe: Path
    starts: dict[str, Path]  # name -> the student that training begins with
    metric: str
    others: dict[str, str] = {}  # tasks that the recipe evaluates and does not train on -> the metric of each


class Method(Strict):
    label: str
    set: dict[str, Any] = {}


class Comparison(Strict):
    methods: list[str]
    cells: list[str]  # task/start
    against: str  # the method whose difference to the others is shown


class Sweep(Strict):
    title: str
    methods: dict[str, str]  # value -> method
    cells: list[str]
    seeds: list[int]


class Adaptivity(Strict):
    method: str
    cells: list[str]
    every: int  # steps between two checkpoints
    prompts: int


class Finished(Strict):
    """Of the students that come out: tokens a block of speculative decoding, and the score on a harder task."""

    cells: list[str]
    prompts: int
    draft_len: int
    harder: Path | None = None  # a task's file


class Plan(Strict):
    seeds: list[int]
    tasks: dict[str, TaskPlan]
    methods: dict[str, Method]
    comparison: Comparison
    sweep: Sweep | None = None
    adaptivity: Adaptivity | None = None
    finished: Finished | None = None

    def only(self, cells: list[str] | None, seeds: list[int] | None) -> Plan:
        """Raises RecipeError: a cell that the plan has not."""
        known = self.comparison.cells
        for cell in cells or []:
            if cell not in known:
                raise RecipeError(f"--cells: there is no {cell} in the plan; it has {', '.join(known)}")
        parts = {
            name: part.model_copy(update={"cells": [c for c in part.cells if cells is None or c in cells]})
            for name in ("comparison", "sweep", "adaptivity", "finished")
            if (part := getattr(self, name)) is not None
        }
        return self.model_copy(update={**parts, "seeds": seeds or self.seeds})

    def runs(self) -> list[Run]:
        """Seed by seed, so that what is done is worth something whenever it is looked at."""
        return list(dict.fromkeys(self._runs()))

    def _runs(self) -> Iterator[Run]:
        for seed in self.seeds:
            named = list(product(self.comparison.cells, self.comparison.methods))
            if self.sweep is not None and seed in self.sweep.seeds:
                named += product(self.sweep.cells, self.sweep.methods.values())
            yield from (self.run(cell, method, seed) for cell, method in named)

    def metric_of(self, cell: str) -> str:
        return self.tasks[cell.split("/")[0]].metric

    def run(self, cell: str, method: str, seed: int) -> Run:
        name, start = cell.split("/")
        task = self.tasks[name]
        options = {
            **{key: seed for key in SEEDED if key != TASK_SEED or not task.others},
            "openrlhf.actor.model_name_or_path": str(task.starts[start]),
            **self.methods[method].set,
            **self._measured(cell, method, seed),
        }
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in options.items())
        return Run(name, start, method, seed, task.recipe, overrides)

    def _measured(self, cell: str, method: str, seed: int) -> dict[str, Any]:
        """Models before training are measured once a cell and seed; checkpoints are kept for the adaptivity only."""
        first = method == self.comparison.methods[0]
        options: dict[str, Any] = {"skd.eval.at_start": first, "skd.eval.teacher": first}
        if self.is_followed(cell, method, seed):
            options |= {
                "openrlhf.ckpt.save_hf": True,
                "openrlhf.ckpt.save_steps": self.adaptivity.every,
                "openrlhf.ckpt.max_num": 1000,
            }
        return options

    def is_followed(self, cell: str, method: str, seed: int) -> bool:
        part = self.adaptivity
        return part is not None and cell in part.cells and method == part.method and seed == self.seeds[0]


def load_plan(path: Path) -> Plan:
    """Paths are relative to the file.

    Raises:
        RecipeError: no such file, an unknown key, a cell or method that is not defined.
    """
    try:
        plan = Plan(**yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError, TypeError) as error:
        raise RecipeError(f"the plan {path} cannot be used: {error}") from error
    for task in plan.tasks.values():
        task.recipe = (path.parent / task.recipe).resolve()
        task.starts = {name: (path.parent / student).resolve() for name, student in task.starts.items()}
    if plan.finished is not None and plan.finished.harder is not None:
        plan.finished.harder = (path.parent / plan.finished.harder).resolve()
    cells = [f"{name}/{start}" for name, task in plan.tasks.items() for start in task.starts]
    named = [*plan.comparison.methods, plan.comparison.against]
    named += plan.sweep.methods.values() if plan.sweep else []
    named += [plan.adaptivity.method] if plan.adaptivity else []
    _all_known(named, list(plan.methods), "method", path)
    for part in filter(None, (plan.comparison, plan.sweep, plan.adaptivity, plan.finished)):
        _all_known(part.cells, cells, "cell", path)
    return plan


def _all_known(names: list[str], known: list[str], what: str, path: Path) -> None:
    for name in names:
        if name not in known:
            raise RecipeError(f"{path}: there is no {what} {name}; it defines {', '.join(known)}")
