"""What is checked: a recipe, read as far as it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from skd_plugin.config.host_options import HostOptions, host_parser
from skd_plugin.config.recipe import load_recipe
from skd_plugin.config.run import Run
from skd_plugin.config.teacher import ONLY
from skd_plugin.errors import RecipeError
from skd_plugin.host.teacher_prompts import teacher_of
from skd_plugin.models import joined_ends
from skd_plugin.prepare.load_run import Models, load_run, on_cpu, read_models


@dataclass(frozen=True)
class Subject:
    models: Models | None  # None: the options could not be typed
    run: Run | None  # None: there is an error
    error: str | None  # why `skd train` would refuse the recipe

    @cached_property
    def options(self) -> HostOptions:
        """All of OpenRLHF's, as its parser gives them to a run; the best that is known where there is no run."""
        if self.run is not None:
            return vars(host_parser().parse_args(self.run.host_argv()))
        return self.models.options if self.models is not None else {}

    @property
    def cpu(self) -> bool:
        return self.models.cpu if self.models is not None else on_cpu("auto")

    @property
    def teachers(self) -> dict[str, str | None]:
        """Models by name; of a recipe that says none, one that is not known."""
        if self.models is None:
            return {ONLY: None}
        return {name: teacher.model_name_or_path for name, teacher in self.models.skd.all_teachers.items()}

    def of_teacher(self, name: str) -> Subject:
        """The recipe as it were with this teacher alone, and its prompts."""
        models, run = self.models, self.run
        if models is not None:
            models = models.of_teacher(name)
        if run is not None:
            own = [prompt for prompt in run.prompts if teacher_of(prompt) == name]
            run = replace(run, skd=run.skd.of_teacher(name), prompts=own)
        return replace(self, models=models, run=run)

    @property
    def student(self) -> str | None:
        return self.options.get("actor.model_name_or_path")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that are one end event; of the only teacher, where both models load."""
        teacher, student = self.teachers[ONLY], self.student
        joins = self.models is not None and self.models.skd.joins_ends
        return joined_ends(teacher, student) if joins and teacher and student else ()


def read_subject(recipe: str, overrides: Sequence[str]) -> Subject:
    """Raises RecipeError: the file is no recipe; there is nothing to check."""
    content, models = load_recipe(recipe, overrides), None
    try:
        models = read_models(content)
        return Subject(models, load_run(recipe, overrides), None)
    except RecipeError as error:
        return Subject(models, None, str(error))
