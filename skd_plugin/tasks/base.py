"""What a task is: prompts, references and a checker. A new task is one file with a class like this one."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Example(NamedTuple):
    prompt: str
    reference: str  # a correct response, without the end token
    label: str  # what `score` compares with


class Task(Protocol):
    name: str
    metric: str  # what the mean of `score` is called, e.g. "accuracy"

    def examples(self, split: str, count: int, seed: int = 0) -> list[Example]:
        """`count` examples of `split` ("train" or "test"); the same arguments give the same examples."""
        ...

    def score(self, response: str, label: str) -> float:
        """Score of one response in [0, 1]."""
        ...
