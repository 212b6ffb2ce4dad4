"""`skd.task`, or one of `skd.tasks`, of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from skd_plugin.config.section import Section
from skd_plugin.config.teacher import TeacherPromptConfig


class TaskConfig(Section):
    name: str = Field(
        description="a task of skd_plugin.tasks, reasoning_gym:DATASET, or the path of a .py file with a task; it "
        "makes the prompts and checks the answers"
    )
    path: str | None = Field(
        None, description="of a task that reads a dataset: a folder with train and test as .json, .jsonl or .parquet"
    )
    evaluating_checker: bool = Field(
        False,
        description="take a dataset of reasoning-gym whose checker evaluates answers as code, in a process of its own "
        "that reaches no file and no network: docs/tasks.md",
    )
    template: str | None = Field(None, description="of such a task: form of its prompt, with columns in braces")
    train_prompts: Annotated[int, Field(ge=0)] | Literal["full"] = Field(
        8192, description="a number, or full: all that the dataset has; 0: for evaluation only"
    )
    eval_prompts: Annotated[int, Field(ge=0)] | Literal["full"] = Field(128, description="likewise, of held-out ones")
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="of one task among several; default: its number of train_prompts"
    )
    top_k: int | None = Field(None, ge=1, description="K of one task among several; default: skd.rollout.top_k")
    max_new_tokens: int | None = Field(
        None, ge=1, description="longest response of one task among several; default: skd.rollout.max_new_tokens"
    )
    seed: int = Field(0, description="of the choice of prompts")
    teacher: str | None = Field(None, description="of several teachers (skd.teachers), the name of the one it has")
    teacher_prompt: TeacherPromptConfig | None = Field(None, description="of this task; default: skd.teacher.prompt")

    @model_validator(mode="after")
    def _columns_of_a_task(self) -> TaskConfig:
        if self.teacher_prompt is not None:
            refuse_column(self.teacher_prompt, f"task {self.name}")
        return self


def refuse_column(prompt: TeacherPromptConfig, whose: str) -> None:
    if prompt.column is not None:
        raise ValueError(f"the teacher's prompt has a column, but {whose} makes its prompts; use template")
