"""Tasks whose examples are drawn at random: no data to fetch, as many prompts as wanted, a closed vocabulary of words.

Their prompts and responses are lower-case words and signs with a blank before each, so that a word is a token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from skd_plugin.tasks.base import Example, Task, TaskError, check_split, split_of

PATIENCE = 10_000  # draws without a new prompt, after which there seem to be no more


class GeneratedTask(Task):
    """What every generated task shares; a subclass draws one example at a time and lists its words."""

    def draw(self, rng: random.Random) -> Example:
        raise NotImplementedError

    def split(self, example: Example) -> str:
        """Splits never share a prompt, whatever their seeds: the prompt itself says where it belongs."""
        return split_of(example.prompt)

    def vocabulary(self) -> list[str]:
        """Every token of the task, once. A word carries the blank before it."""
        raise NotImplementedError

    def examples(self, split: str, count: int | None, seed: int = 0) -> list[Example]:
        rng = random.Random(f"{self.name}/{split}/{seed}")
        drawn = iter(lambda: self.draw(rng), None)  # without an end
        return first_of(self.name, split, count, ((self.split(example), example) for example in drawn), PATIENCE)


def first_of(
    name: str, split: str, count: int | None, drawn: Iterator[tuple[str, Example]], patience: int
) -> list[Example]:
    """The first `count` examples of a split, no prompt twice, of a task whose `drawn` examples have no end.

    Args:
        drawn: each with the split that it belongs to.
        patience: draws without a new prompt, after which there seem to be no more.

    Raises:
        TaskError: there is no such split, `count` is None, or there are not as many.
    """
    check_split(split)
    if count is None:
        raise TaskError(f"task {name} has no end of prompts, so that 'full' is no number of them; give one")
    seen: dict[str, Example] = {}
    idle = 0
    while len(seen) < count:
        side, example = next(drawn)
        is_new = example.prompt not in seen and side == split
        idle = 0 if is_new else idle + 1
        if is_new:
            seen[example.prompt] = example
        elif idle == patience:
            raise TaskError(f"task {name} has about {len(seen)} {split} prompts, but {count} are asked for")
    return list(seen.values())


def closed_vocabulary(words: Iterable[str], openings: Iterable[str]) -> list[str]:
    """Tokens of `words`, each with the blank before it, and of the words that open a prompt, which have none."""
    return [f" {word}" for word in sorted(set(words))] + sorted(set(openings))
