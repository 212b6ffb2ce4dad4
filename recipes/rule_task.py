"""A task of one rule that its prompts do not tell: what is to be done with a list of words.

    words : cat sun map hat .
    -> first : hat cat sun map . then : map cat sun hat . next : map cat sun . the answer is map cat sun

For recipes/context-distillation.yaml, in which the teacher alone is told the rule.
"""

import random

from skd_plugin.tasks.arithmetic import CONNECTIVES
from skd_plugin.tasks.base import Example, split_of
from skd_plugin.tasks.instructions import FINAL, LENGTH, OPERATIONS, WORDS, Instructions

RULE = ("back", "swap", "last")  # names of operations; the recipe says them in words


class Rule(Instructions):
    name = "rule"

    def draw(self, rng: random.Random) -> Example:
        given = words = rng.sample(WORDS, rng.randint(*LENGTH))
        steps = []
        for name in RULE:
            _, operation = OPERATIONS[name]
            words = operation(words, "", "")
            steps.append(f" {rng.choice(CONNECTIVES) if steps else 'first'} : {' '.join(words)} .")
        answer = " ".join(words)
        return Example(f"words : {' '.join(given)} .", f"{''.join(steps)} {rng.choice(FINAL)} {answer}", answer)

    def split(self, example: Example) -> str:
        return split_of(example.prompt)


TASK = Rule
