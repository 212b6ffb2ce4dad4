"""Several teachers of one run: which engines have them, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.teacher import ONLY
from skd_plugin.errors import RecipeError
from skd_plugin.models import common_vocab_size, joined_ends


@contextmanager
def named(teacher: str) -> Iterator[None]:
    """What is wrong with one of several teachers says which one it is."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"skd.teachers.{teacher}: {error}" if teacher != ONLY else str(error)) from error


def share_out(skd: SKDConfig, prompts: Mapping[str, int], engines: int) -> SKDConfig:
    """The recipe with the number of each teacher's engines in it.

    What an entry gives stays; every other engine goes to the teacher with the most prompts an engine.

    Args:
        prompts: of training, by the teacher.
        engines: of the run.

    Raises:
        RecipeError: they do not come out even.
    """
    given = {name: teacher.engines for name, teacher in skd.teachers.items()}
    counts = {name: number or 1 for name, number in given.items()}
    left = engines - sum(counts.values())
    free = [name for name, number in given.items() if number is None]
    if left < 0 or (left and not free):
        raise RecipeError(
            f"the engines of skd.teachers ({_listed(counts)}) are {sum(counts.values())}, but "
            f"openrlhf.vllm.num_engines is {engines}; change one of the two, or leave the engines of a teacher out, "
            "which then gets the rest"
        )
    for _ in range(left):
        counts[max(free, key=lambda name: prompts.get(name, 0) / counts[name])] += 1
    shared = {name: teacher.model_copy(update={"engines": counts[name]}) for name, teacher in skd.teachers.items()}
    return skd.model_copy(update={"teachers": shared})


def check_each_has_prompts(skd: SKDConfig, prompts: Mapping[str, int], *, whole: bool) -> None:
    """Raises RecipeError for a teacher whose engines would wait for the whole run.

    Args:
        prompts: of training, by the teacher.
        whole: they are all that there are.
    """
    idle = [name for name in skd.teachers if not prompts.get(name)]
    if idle and whole and not skd.all_tasks:
        raise RecipeError(
            f"skd.teachers.{idle[0]}: no row of openrlhf.data.prompt_dataset names it in '{skd.teacher_column}' "
            "(skd.teacher_column); leave it out"
        )


def check_alike(skd: SKDConfig, student: str) -> None:
    """Raises RecipeError for teachers with which the student would have different distributions: the trainer's is over
    the ids of the engine's, with the same ends of a turn as one event.
    """
    models = {name: teacher.model_name_or_path for name, teacher in skd.all_teachers.items()}
    common = {name: common_vocab_size(model, student) for name, model in models.items()}
    if len(set(common.values())) > 1:
        raise RecipeError(
            f"skd.teachers: with the student they have different numbers of output rows in common "
            f"({_listed(common)}), padding behind the last token included; take teachers whose output layers are as "
            "large as each other's, or all at least as large as the student's"
        )
    ends = {name: joined_ends(model, student) if skd.joins_ends else () for name, model in models.items()}
    if len(set(ends.values())) > 1:
        raise RecipeError(
            f"skd.teachers: they end their turns with different tokens (ids that are one event with the student's: "
            f"{_listed(ends)}); take teachers that end alike, or set skd.end_tokens=apart"
        )


def _listed(found: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())
