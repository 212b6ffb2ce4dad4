"""A task of one rule that its prompts do not tell: in which order a metro line has its stops.

    from milk , bag .
    -> milk pen bed cup , bag sock hill drum .

From each stop that is named, three stops on; the line is a circle. For recipes/self-distillation.yaml, in which the
teacher alone is told the line, or the solution of each prompt. scripts/make_reader.py makes a model that reads both.
"""

import random
from collections.abc import Sequence
from itertools import pairwise

from skd_plugin.tasks.base import Example, mean
from skd_plugin.tasks.generated import GeneratedTask, closed_vocabulary

NAMES = (
    "bag bed bell boat book bread car clock corn cup door drum egg fish gate hill ink jar kite lamp map milk pen sock"
).split()
LINE = "milk pen bed cup jar kite bag sock hill drum lamp egg corn boat gate ink".split()
STOPS = 3  # from each start
STARTS = (2, 3)  # of a prompt, inclusive

# What a teacher may be told, as templates of skd.teacher.prompt; the recipe has the same.
RULE = "the line : {line} . {input}"
SOLUTION = "like this :{reference} {input}"
ANSWER = "it ends at : {answer} . {input}"
HELP = (RULE, SOLUTION, ANSWER)


def walks(line: Sequence[str], starts: Sequence[int]) -> Example:
    """The stops from each of these places of a line; the label is where each walk ends."""
    ways = [[line[(start + stop) % len(line)] for stop in range(STOPS + 1)] for start in starts]
    prompt = f"from {' , '.join(way[0] for way in ways)} ."
    return Example(prompt, " ,".join(f" {' '.join(way)}" for way in ways) + " .", " ".join(way[-1] for way in ways))


def around(line: Sequence[str], start: int = 0) -> str:
    """The whole line in words, from a place of it back to that place."""
    return " ".join([*line[start:], *line[:start], line[start]])


class Line(GeneratedTask):
    name = "line"
    metric = "accuracy"
    max_new_tokens = 16

    def draw(self, rng: random.Random) -> Example:
        return walks(LINE, rng.sample(range(len(LINE)), rng.randint(*STARTS)))

    def score(self, response: str, label: str) -> float:
        """1.0 if every walk ends where it should, else 0.0."""
        return float(" ".join(_ends(response)) == label)

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """`stops`: share of the steps from one stop to the next that the line has."""
        following = dict(zip(LINE, [*LINE[1:], LINE[0]], strict=True))
        ways = [way for response in responses for way in _ways(response)]
        steps = [float(following.get(here) == there) for way in ways for here, there in pairwise(way)]
        return {"stops": mean(steps) if steps else 0.0}

    def vocabulary(self) -> list[str]:
        told = " ".join(template.format(line="", reference="", answer="", input="from") for template in HELP)
        return closed_vocabulary([*NAMES, *told.split(), ","], ["from", *(template.split()[0] for template in HELP)])


def _ways(response: str) -> list[list[str]]:
    return [way.split() for way in response.strip().removesuffix(" .").split(" , ")]


def _ends(response: str) -> list[str]:
    return [way[-1] for way in _ways(response) if way]


TASK = Line
