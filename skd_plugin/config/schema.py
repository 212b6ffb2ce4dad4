"""The `skd:` section of a recipe: its parts, and what of one part goes with what of another."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from skd_plugin.config.loss import LossConfig
from skd_plugin.config.movable import VALUE_FORMS
from skd_plugin.config.objective import ObjectiveConfig
from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.config.section import Section, refuse_idle
from skd_plugin.config.served import refuse_unserved
from skd_plugin.config.task import TaskConfig, refuse_column
from skd_plugin.config.teacher import ONLY, StudentConfig, TeacherConfig, TeacherPromptConfig
from skd_plugin.core.gates import GATES
from skd_plugin.core.losses import LOSSES
from skd_plugin.core.methods import METHODS
from skd_plugin.errors import RecipeError, unknown_key


class EvalConfig(Section):
    teacher: bool = Field(True, description="measure the teacher once, before training")
    at_start: bool = Field(True, description="evaluate the student before the first step")


TEACHER_NAME = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # it becomes a part of the names of metrics


class SKDConfig(Section):
    teacher: TeacherConfig | None = None
    teachers: dict[TEACHER_NAME, TeacherConfig] = Field(
        {},
        description="several teachers, in place of skd.teacher: by name, each with its options; an engine has one of "
        "them (docs/several_teachers.md)",
    )
    teacher_column: str | None = Field(
        None, description="of several teachers: the column of a dataset that names a row's; a task names its own"
    )
    student: StudentConfig = StudentConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    task: TaskConfig | None = None
    tasks: tuple[TaskConfig, ...] = Field((), description="several tasks in one run, in place of skd.task")
    mix_temperature: float = Field(
        1.0, gt=0, description="of several tasks: shares proportional to weight^(1/temperature); more is more even"
    )
    eval: EvalConfig = EvalConfig()
    run_dir: str = Field("runs/skd", description="everything a run leaves behind is in this folder")
    resume: bool = Field(True, description="go on with an unfinished run of the same recipe in the run folder")
    trust_remote_code: bool = Field(
        False, description="run the Python files that a model's folder brings (auto_map); see docs/security.md"
    )
    pickle_weights: bool = Field(
        False, description="load weights that are pickles (.bin), which may run anything; see docs/security.md"
    )
    end_tokens: Literal["auto", "apart"] = Field(
        "auto",
        description="auto: where the two models end their turns with other tokens, these tokens are one event, in "
        "sampling and in the loss; apart: each is itself",
    )
    traces_per_step: int = Field(4, ge=0, description="responses of each step that go into traces.jsonl")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where this machine has it")
    vllm: dict[str, Any] = Field({}, description="further engine arguments of vLLM, as its EngineArgs names them")

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Those of the run by name, in the recipe's order; a single one is called `ONLY`."""
        return self.teachers or {ONLY: self.the_teacher}

    @property
    def the_teacher(self) -> TeacherConfig:
        """Of a recipe with one, or of what `of_teacher` made of one with several."""
        assert self.teacher is not None, "this recipe has several teachers"
        return self.teacher

    @property
    def any_teacher(self) -> TeacherConfig:
        """One of them, for what is the same with all (`check_alike` in prepare/teachers.py)."""
        return next(iter(self.all_teachers.values()))

    def of_teacher(self, name: str) -> SKDConfig:
        """The recipe as it were with this teacher alone, and the tasks that it has."""
        if not self.teachers:
            return self
        tasks = [task.model_copy(update={"teacher": None}) for task in self.all_tasks if task.teacher == name]
        alone = {"teacher": self.teachers[name].model_copy(update={"engines": None}), "teachers": {}}
        return self.model_copy(update=alone | {"teacher_column": None, "task": None, "tasks": tuple(tasks)})

    def teachers_of_engines(self, number: int) -> list[str]:
        """The teacher that each of the run's engines has; of several, as they have been shared out."""
        if not self.teachers:
            return [ONLY] * number
        return [name for name, teacher in self.teachers.items() for _ in range(teacher.engines or 0)]

    def teacher_prompt(self, task: TaskConfig | None = None) -> TeacherPromptConfig | None:
        """The teacher's own, of a task or of a dataset; None: it reads the student's."""
        if task is not None and task.teacher_prompt is not None:
            return task.teacher_prompt
        teacher = self.the_teacher
        if teacher.prompt is None and teacher.chat_template_kwargs:
            return TeacherPromptConfig()
        return teacher.prompt

    @property
    def joins_ends(self) -> bool:
        """Whether tokens that end a turn are one, where the two models have others."""
        return self.end_tokens == "auto"

    @property
    def draft_len(self) -> int:
        """Tokens of the longest block that the student proposes; 0 where the teacher is elsewhere: it writes alone."""
        return 0 if self.is_served else self.rollout.most_drafts

    @property
    def is_served(self) -> bool:
        """Whether the teacher is elsewhere (skd.teacher.url), and the student alone in the engine."""
        return self.teacher is not None and bool(self.teacher.urls)

    @property
    def teacher_prompts(self) -> list[TeacherPromptConfig]:
        """All forms of them."""
        parts = map(self.of_teacher, self.all_teachers)
        forms = [part.teacher_prompt(task) for part in parts for task in part.all_tasks or (None,)]
        return [form for form in forms if form is not None]

    @property
    def longest_teacher_prompt(self) -> int | None:
        """Tokens of the longest prompt of the teacher's own, where the recipe says how long it may be."""
        return max((prompt.max_len for prompt in self.teacher_prompts if prompt.max_len), default=None)

    @property
    def all_tasks(self) -> tuple[TaskConfig, ...]:
        """Those of the run, whichever way they are given."""
        return self.tasks or ((self.task,) if self.task else ())

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> SKDConfig:
        if self.teacher is None and not self.teachers:
            raise ValueError("the teacher is missing: give skd.teacher, or several by name in skd.teachers")
        if self.teacher is not None and self.teachers:
            raise ValueError("skd.teacher and skd.teachers are both given; leave one out (teacher: null for a base's)")
        named = [task for task in self.all_tasks if task.teacher is not None]
        if self.teacher is not None:
            refuse_idle(self, {"teacher_column": False}, "there is one teacher (skd.teacher)")
            refuse_idle(self.teacher, {"engines": False}, "the only teacher is in every engine")
            if named:
                raise ValueError(f"task {named[0].name} names a teacher, but there is one (skd.teacher); leave it out")
            return self
        refuse_idle(self, {"teacher_column": not self.all_tasks}, "the tasks name their teachers")
        if not self.all_tasks and self.teacher_column is None:
            raise ValueError("teachers are several, so teacher_column must name the dataset's column of their names")
        for task in self.all_tasks:
            if task.teacher not in self.teachers:
                has = "names no teacher" if task.teacher is None else f"has a teacher '{task.teacher}'"
                raise ValueError(f"task {task.name} {has}; teacher is one of {', '.join(self.teachers)}")
        for name, teacher in self.teachers.items():
            if self.all_tasks and name not in [task.teacher for task in self.all_tasks]:
                raise ValueError(f"no task has teacher '{name}', so its engine would wait; leave it out")
            if teacher.follow is not None:
                raise ValueError(
                    f"teachers.{name}.follow: of several teachers none can move, for the student's weights would be "
                    "sent into every engine's; only a single one does (skd.teacher)"
                )
        return self

    @model_validator(mode="after")
    def _one_task_or_several(self) -> SKDConfig:
        if self.task and self.tasks:
            raise ValueError("skd.task and skd.tasks are both given; move the one into the list of the others")
        for teacher in self.all_teachers.values():
            if self.all_tasks and teacher.prompt is not None:
                refuse_column(teacher.prompt, "a task")
        effects = {"mix_temperature": len(self.tasks) > 1}
        refuse_idle(self, effects, "it is for several tasks (skd.tasks)")
        for config in self.all_tasks:
            alone = len(self.all_tasks) == 1
            if config.weight is not None and (alone or config.train_prompts == 0):
                reason = "it is the only task" if alone else "its train_prompts is 0"
                raise ValueError(f"the weight of task {config.name} has no effect: {reason}")
        return self

    @model_validator(mode="after")
    def _sampling_of_one_among_several(self) -> SKDConfig:
        for config in self.all_tasks:
            own = [name for name in ("top_k", "max_new_tokens") if getattr(config, name) is not None]
            if own and len(self.all_tasks) == 1:
                raise ValueError(f"task {config.name} is the only one: set skd.rollout.{own[0]} in place of its own")
            if config.top_k is not None and not self.rollout.has_top_k:
                raise ValueError(
                    f"the top_k of task {config.name} has no effect: no token is put to a K where the method is "
                    f"{self.rollout.method} and the gate {self.rollout.gate}"
                )
        return self

    @model_validator(mode="after")
    def _policy_gradient_of_the_policy(self) -> SKDConfig:
        if not self.objective.uses_rewards:
            return self
        rollout = self.rollout
        if not METHODS[rollout.method].has_student_text:
            raise ValueError(
                f"rewards (objective.rl_coef) teach the student's own tokens, but rollout.method '{rollout.method}' "
                "has none; use skd, on_policy or a mixed method"
            )
        if (rollout.student_temperature, rollout.student_top_p) != (1.0, 1.0) or rollout.reference_compat:
            raise ValueError(
                "the policy that rewards train is the student at temperature 1 and top-p 1; with objective.rl_coef "
                "its proposals must be drawn so (rollout.student_temperature, student_top_p, reference_compat)"
            )
        weighted = self.objective.replaced_tokens == "importance"
        if weighted and (
            (rollout.teacher_temperature, rollout.teacher_top_p) != (1.0, 1.0) or rollout.replacement == "argmax"
        ):
            raise ValueError(
                "objective.replaced_tokens: importance divides by the teacher's probability at temperature 1, so the "
                "teacher's tokens must be drawn so (rollout.teacher_temperature, teacher_top_p, replacement)"
            )
        gate = GATES[rollout.gate_name]
        if weighted and not gate.replaces_from_teacher:
            raise ValueError(
                f"gate '{rollout.gate}' replaces from {gate.replaced_from}, not from p; use replaced_tokens: exclude"
            )
        return self

    @model_validator(mode="after")
    def _teacher_elsewhere(self) -> SKDConfig:
        served = [name for name, teacher in self.teachers.items() if teacher.urls]
        if served:
            raise ValueError(
                f"teachers.{served[0]}.url: a teacher that is elsewhere is the only one of a run (skd.teacher.url); "
                "several are in engines"
            )
        if self.teacher is not None and self.teacher.urls:
            refuse_unserved(self.teacher, self.rollout, self.loss, self.vllm)
        return self

    @model_validator(mode="after")
    def _scores_of_prompts(self) -> SKDConfig:
        by = self.loss.prompts.by
        if by == "acceptance" and not METHODS[self.rollout.method].has_gate:
            raise ValueError(f"loss.prompts.by: acceptance needs a gate, and method '{self.rollout.method}' has none")
        if by == "reward" and not self.objective.uses_rewards:
            raise ValueError(
                "loss.prompts.by: reward needs rewards, which are not asked for where objective.rl_coef is 0"
            )
        return self

    @model_validator(mode="after")
    def _weight_of_legs(self) -> SKDConfig:
        has_legs = self.rollout.hand_over is not None
        refuse_idle(self.loss, {"handed_weight": has_legs}, "the teacher has no legs (rollout.hand_over)")
        if not has_legs and any(region.where == "handed" for region in self.loss.regions):
            raise ValueError(
                "loss.regions: there is no token in 'handed' without legs of the teacher (rollout.hand_over)"
            )
        return self

    @model_validator(mode="after")
    def _labels_of_flagged_tokens(self) -> SKDConfig:
        for kind in sorted(self.loss.kinds):
            if not self.rollout.write_back and LOSSES[kind].of_labels is not None:
                raise ValueError(
                    f"rollout.write_back: false leaves rejected tokens in the text, and {kind} would teach them; "
                    "use a divergence as loss.kind, loss.replaced_kind and in loss.regions"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _loss_of_the_method(cls, given: Any) -> Any:
        """Some methods have one loss (`seq_kd`); a recipe need not name it, and may not name another."""
        if not isinstance(given, dict):
            return given
        rollout, loss = (given.get(name) or {} for name in ("rollout", "loss"))
        if not isinstance(rollout, dict) or not isinstance(loss, dict):
            return given
        name = rollout.get("method")
        method = METHODS.get(name) if isinstance(name, str) else None
        if method is None or method.loss is None:
            return given
        for option in ("kind", "replaced_kind"):  # all its tokens are the teacher's
            if (loss.get(option) or method.loss) != method.loss:
                raise ValueError(
                    f"method '{name}' learns the teacher's tokens, so skd.loss.{option} is {method.loss} and not "
                    f"'{loss[option]}'; for another loss on the teacher's text use method: teacher"
                )
        if loss.get("regions"):
            raise ValueError(f"method '{name}' learns every token by {method.loss}, so there are no skd.loss.regions")
        return {**given, "loss": {**loss, "kind": method.loss}}


def field_docs(section: type[BaseModel] = SKDConfig, prefix: str = "skd") -> dict[str, tuple[Any, str]]:
    """Dotted name -> (default or None, description) of every option, for `--help` and the flag parser."""
    docs: dict[str, tuple[Any, str]] = {}
    for name, info in section.model_fields.items():
        kinds = [k for k in getattr(info.annotation, "__args__", (info.annotation,)) if k is not type(None)]
        if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel):
            docs |= field_docs(kinds[0], f"{prefix}.{name}")
        else:
            default = None if info.is_required() else info.default
            docs[f"{prefix}.{name}"] = default, info.description or ""
    return docs


def parse_skd(section: dict[str, Any]) -> SKDConfig:
    """The `skd:` section of a recipe.

    Raises:
        RecipeError: an unknown option (the nearest one is named), or a value that is refused.
    """
    try:
        return SKDConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("skd", *(str(part) for part in first["loc"] if part not in VALUE_FORMS)))
        if first["type"] == "extra_forbidden":
            raise RecipeError(unknown_key(key, field_docs())) from error
        if first["type"] == "value_error":  # a check of ours between two options
            raise RecipeError(f"{key}: {first['ctx']['error']}") from error
        got = "" if first["type"] == "missing" else f"; got {first['input']!r}"
        raise RecipeError(f"{key}: {first['msg'].lower()}{got}") from error
