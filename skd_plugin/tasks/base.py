"""What a task is: prompts, references and a checker. A new task is one file with a class like this; docs/tasks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

SPLITS = ("train", "test")
HELD_OUT = "heldout"  # name in the metrics of prompts whose dataset names no source


class TaskError(ValueError):
    """A task cannot make what it is asked for. The message says what was found, what was expected and what to do."""


class Example(NamedTuple):
    prompt: str
    reference: str  # a correct response, without the end token
    label: str  # what `score` compares with


class Task(Protocol):
    """A class that inherits from this one has the defaults; one that only looks like it will do."""

    name: ClassVar[str]
    metric: ClassVar[str]  # what the mean of `score` is called, e.g. "accuracy"
    max_new_tokens: ClassVar[int]  # longest response, of a recipe that does not say
    packages: ClassVar[tuple[str, ...]] = ()  # modules that the checker imports and the plugin does not install
    options: ClassVar[tuple[str, ...]] = ()  # of skd.task, those that the class is made with

    def examples(self, split: str, count: int | None, seed: int = 0) -> list[Example]:
        """`count` examples of `split` ("train" or "test"), no prompt twice; the same arguments give the same ones.

        Args:
            count: None is all there are.

        Raises:
            TaskError: there are not as many.
        """
        ...

    def score(self, response: str, label: str) -> float:
        """Score of one response in [0, 1]."""
        ...

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """Further metrics of an evaluation, over all its responses; the mean of `score` is not among them."""
        return {}


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise TaskError(f"there is no split '{split}'; a task has {' and '.join(SPLITS)}")


def split_of(text: str, one_in: int = 8) -> str:
    """Where a text belongs, by a hash of it: one in `one_in` is "test", whatever seed made it."""
    digest = 0
    for char in text:
        digest = (digest * 131 + ord(char)) % 1_000_003
    return "test" if digest % one_in == 0 else "train"


def further_metrics(task: Task | None, responses: Sequence[str], answers: Sequence[str]) -> Mapping[str, float]:
    """What a task says of its responses beside their scores; a task of the user's own may say nothing."""
    if task is None or not hasattr(task, "metrics"):
        return {}
    return task.metrics(responses, answers)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
