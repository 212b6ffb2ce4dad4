"""Tasks whose examples are drawn at random: no data to fetch, as many prompts as wanted, a closed vocabulary of words.

Their prompts and responses are lower-case words and signs with a blank before each, so that a word is a token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

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
        check_split(split)
        if count is None:
            raise TaskError(f"task {self.name} has no end of prompts, so that 'full' is no number of them; give one")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        seen: dict[str, Example] = {}
        idle = 0
        while len(seen) < count:
            example = self.draw(rng)
            is_new = example.prompt not in seen and self.split(example) == split
            idle = 0 if is_new else idle + 1
            if is_new:
                seen[example.prompt] = example
            elif idle == PATIENCE:
                raise TaskError(f"task {self.name} has about {len(seen)} {split} prompts, but {count} are asked for")
        return list(seen.values())


def closed_vocabulary(words: Iterable[str], openings: Iterable[str]) -> list[str]:
    """Tokens of `words`, each with the blank before it, and of the words that open a prompt, which have none."""
    return [f" {word}" for word in sorted(set(words))] + sorted(set(openings))
