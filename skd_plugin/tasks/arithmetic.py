"""Multi-step arithmetic stories with written steps; one wrong step spoils the answer.

    tom has 47 coins . he finds 38 more . he loses 12 . how many coins does tom have ?
    -> first 47 + 38 = 85 . then 85 - 12 = 73 . the answer is 73

An offline twin of GSM8K: generated, checkable, and long enough that an early mistake puts every later token off the
teacher's distribution. The wording of a step is drawn at random, so a teacher that has learned the task has entropy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from skd_plugin.tasks.base import Example, mean
from skd_plugin.tasks.generated import GeneratedTask

MAX_VALUE = 999

NAMES = (
    "tom ann ben eva max ida leo mia sam zoe jon amy dan kim lee pam ray sue ted una vic wes abe bea cal dot eli fay "
    "gus hal ivy jed kay lou meg ned oda pat quin rob sid tia uma val will xena yan zac"
).split()
ITEMS = (
    "coins apples books cards shells stamps pens cups eggs nuts plums figs limes bricks beads pins nails boxes bags "
    "discs keys maps rings ropes seeds socks tiles toys wires bells"
).split()
GAIN = "finds buys gets wins earns".split()
LOSE = "loses sells gives drops spends".split()
CONNECTIVES = "then next now after".split()
FINAL = ("the answer is", "so the answer is", "in total the answer is")

_ANSWER = re.compile(r"the answer is (\d+)\s*$")
_STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


class Arithmetic(GeneratedTask):
    name = "arithmetic"
    metric = "accuracy"
    max_new_tokens = 96
    num_steps = (3, 5)  # operations of a story, inclusive

    def score(self, response: str, label: str) -> float:
        """1.0 if the response ends with the right answer, else 0.0."""
        found = _ANSWER.search(response.strip())
        return float(found is not None and found.group(1) == label)

    @staticmethod
    def step_validity(response: str) -> float:
        """Share of the written steps that are true equations (0.0 if there is none)."""
        steps = _STEP.findall(response)
        right = sum(int(c) == (int(a) + int(b) if op == "+" else int(a) - int(b)) for a, op, b, c in steps)
        return right / len(steps) if steps else 0.0

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        return {"step_validity": mean([self.step_validity(response) for response in responses])}

    def vocabulary(self) -> list[str]:
        return vocabulary()

    def draw(self, rng: random.Random) -> Example:
        name, item = rng.choice(NAMES), rng.choice(ITEMS)
        value = rng.randint(10, 400)
        story, steps = [f"{name} has {value} {item} ."], []
        for index in range(rng.randint(*self.num_steps)):
            gain = value < 20 or (value < MAX_VALUE - 100 and rng.random() < 0.5)
            amount = rng.randint(2, 99) if gain else rng.randint(2, min(99, value - 1))
            result = value + amount if gain else value - amount
            story.append(f"{name} {rng.choice(GAIN if gain else LOSE)} {amount} .")
            opening = "first" if index == 0 else rng.choice(CONNECTIVES)
            steps.append(f"{opening} {value} {'+' if gain else '-'} {amount} = {result} .")
            value = result
        prompt = " ".join(story) + f" how many {item} ?"
        return Example(prompt, " " + " ".join(steps) + f" {rng.choice(FINAL)} {value}", str(value))


def vocabulary() -> list[str]:
    """Every token of the task. A word carries its leading space; a number is one token a digit."""
    words = {"has", "how", "many", "first", "the", "so", "in", "total", "answer", "is"}
    words.update(NAMES, ITEMS, GAIN, LOSE, CONNECTIVES)
    spaced = sorted(words) + list(".?+-=") + list("0123456789")
    return [f" {word}" for word in spaced] + list("0123456789") + sorted(NAMES)
