"""Instructions for lists of words, carried out step by step; tested on compositions that training never saw.

    words : cat sun map hat . reverse the list , then drop the first word .
    -> first : hat map sun cat . then : map sun cat . the answer is map sun cat

An offline twin of instruction following. Some pairs of operations are kept for the test split: a test instruction has
at least one of them, a training instruction has none.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from skd_plugin.tasks.arithmetic import CONNECTIVES
from skd_plugin.tasks.base import Example, mean, split_of
from skd_plugin.tasks.generated import GeneratedTask, closed_vocabulary

STEPS = (1, 3)  # operations of an instruction, inclusive
LENGTH = (4, 6)  # words of a list, inclusive
WORDS = (
    "ant bag bed bell bird boat book box bread bus cake cap car cat chair clock cloud corn crab cup desk dog "
    "door drum duck egg fan fish flag fork frog gate gift glass hat hill house ink jam jar key kite lamp "
    "leaf lion map milk moon mouse nest nut owl pan pear pen pig pot rain ring road rope sand seed ship shoe "
    "sock song spoon star stone sun tree"
).split()
FINAL = ("the answer is", "so the answer is")

Operation = Callable[[list[str], str, str], list[str]]  # (words, one of them, a new one) -> words
OPERATIONS: dict[str, tuple[tuple[str, ...], Operation]] = {  # name -> (its wordings, what it does)
    "reverse": (("reverse the list", "turn the list around"), lambda w, x, y: w[::-1]),
    "sort": (("sort the words", "put the words in order"), lambda w, x, y: sorted(w)),
    "first": (("drop the first word", "remove the first word"), lambda w, x, y: w[1:]),
    "last": (("drop the last word", "remove the last word"), lambda w, x, y: w[:-1]),
    "swap": (("swap the first and the last word", "swap both ends"), lambda w, x, y: [w[-1], *w[1:-1], w[0]]),
    "rotate": (("move the first word to the end", "put the first word last"), lambda w, x, y: [*w[1:], w[0]]),
    "back": (("move the last word to the front", "put the last word first"), lambda w, x, y: [w[-1], *w[:-1]]),
    "double": (("repeat the last word", "write the last word twice"), lambda w, x, y: [*w, w[-1]]),
    "replace": (("replace X by Y", "write Y in place of X"), lambda w, x, y: [y if v == x else v for v in w]),
    "append": (("add Y at the end", "put Y behind the list"), lambda w, x, y: [*w, y]),
    "prepend": (("add Y at the front", "put Y before the list"), lambda w, x, y: [y, *w]),
    "delete": (("remove X", "drop X"), lambda w, x, y: [v for v in w if v != x]),
}
_ANSWER = re.compile(r"the answer is ([a-z ]+)$")


def is_held_out(names: Sequence[str]) -> bool:
    """Whether two operations that follow each other are a pair that is kept for the test."""
    return any(split_of(f"{first} {second}", one_in=4) == "test" for first, second in pairwise(names))


class Instructions(GeneratedTask):
    name = "instructions"
    metric = "accuracy"
    max_new_tokens = 64

    def draw(self, rng: random.Random) -> Example:
        words = rng.sample(WORDS, rng.randint(*LENGTH))
        given, asked, steps = " ".join(words), [], []
        for index in range(rng.randint(*STEPS)):
            wordings, operation = rng.choice(list(OPERATIONS.values()))
            known, new = rng.choice(words), rng.choice([word for word in WORDS if word not in words])
            asked.append(rng.choice(wordings).replace("X", known).replace("Y", new))
            words = operation(words, known, new)
            steps.append(f" {'first' if index == 0 else rng.choice(CONNECTIVES)} : {' '.join(words)} .")
        answer = " ".join(words)
        reference = f"{''.join(steps)} {rng.choice(FINAL)} {answer}"
        return Example(f"words : {given} . {' , then '.join(asked)} .", reference, answer)

    def split(self, example: Example) -> str:
        return "test" if is_held_out(operations(example.prompt)) else "train"

    def score(self, response: str, label: str) -> float:
        """1.0 if the response ends with the right words, else 0.0."""
        found = _ANSWER.search(response.strip())
        return float(found is not None and found.group(1) == label)

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """`answered`: share of the responses that end with an answer, right or wrong."""
        return {"answered": mean([float(_ANSWER.search(response.strip()) is not None) for response in responses])}

    def vocabulary(self) -> list[str]:
        spoken = {word for wordings, _ in OPERATIONS.values() for text in wordings for word in text.split()}
        spoken |= {word for text in FINAL for word in text.split()}
        return closed_vocabulary(
            {*WORDS, *spoken - {"X", "Y"}, "first", "then", *CONNECTIVES, ".", ",", ":"}, ["words"]
        )


def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    a_word = "[a-z]+"
    return [
        (name, re.compile(wording.replace("X", a_word).replace("Y", a_word)))
        for name, (wordings, _) in OPERATIONS.items()
        for wording in wordings
    ]


_PATTERNS = _patterns()


def operations(prompt: str) -> list[str]:
    """Names of the operations that a prompt asks for, in order."""
    asked = prompt.split(" . ")[1].removesuffix(" .").split(" , then ")
    return [next(name for name, pattern in _PATTERNS if pattern.fullmatch(text)) for text in asked]
