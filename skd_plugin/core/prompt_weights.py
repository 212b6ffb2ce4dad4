"""How much the responses to a prompt count in the distillation loss, by what they have shown of it so far.

A response has a score; the score of a prompt is their mean, of those of one step, and an exponential mean over the
steps in which the prompt was met. The weight is w = floor + (1 - floor) r(score), and the trainer's common factor
(core/token_weights.py) makes the mean over the tokens of an optimizer step 1 again. p is the teacher, q the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from skd_plugin.core.metrics import Figures, metric_of

Score = Callable[[Figures, float], float]  # (figures of a response, its reward) -> a number, NaN where there is none


def acceptance(figures: Figures, reward: float) -> float:
    """Share of the proposals put to the gate that it kept."""
    return metric_of("skd/accept_rate", [figures])


def reward(figures: Figures, reward: float) -> float:
    return reward


def divergence(figures: Figures, reward: float) -> float:
    """1 - exp(-KL(p||q)) of the response's mean KL while sampling: in [0, 1], about KL where it is small."""
    return 1 - math.exp(-max(metric_of("skd/kl", [figures]), 0.0))


def undecided(score: float) -> float:
    """r = 4 s (1 - s), s in [0, 1]: nothing for what always fails or never does. PACED (arXiv 2603.11178)."""
    share = min(max(score, 0.0), 1.0)
    return 4 * share * (1 - share)


def proportional(score: float) -> float:
    """r = s: prompts at which the models differ, in the spirit of DeltaPrompts (arXiv 2605.15532)."""
    return score


class PromptWeighting(NamedTuple):
    score: Score | None  # None: every prompt counts the same
    need: Callable[[float], float]  # of a score -> r in [0, 1]
    words: str  # which prompts count more, for people
    of_whole: bool = False  # it takes the teacher's whole distribution while sampling


PROMPT_WEIGHTINGS: dict[str, PromptWeighting] = {
    "none": PromptWeighting(None, proportional, "all prompts count the same"),
    "acceptance": PromptWeighting(acceptance, undecided, "those of which the gate keeps about half"),
    "reward": PromptWeighting(reward, undecided, "those that succeed about half of the time"),
    "divergence": PromptWeighting(divergence, proportional, "those at which the models differ", of_whole=True),
}


class PromptWeights:
    """Scores of the prompts of a run, and what they make of each response's weight."""

    def __init__(self, by: str, floor: float, memory: float) -> None:
        """
        Args:
            by: a name of `PROMPT_WEIGHTINGS`.
            floor: in [0, 1), the least weight of a prompt relative to the most.
            memory: in [0, 1), share of its earlier score that a prompt keeps when it is met again.
        """
        self._score, self._need = PROMPT_WEIGHTINGS[by][:2]
        self._floor, self._memory = floor, memory
        self._scores: dict[str, float] = {}

    def weigh(self, prompts: Sequence[str], figures: Sequence[Figures], rewards: Sequence[float]) -> list[float]:
        """The weight of each response of a step, whose scores are taken in first; 1 where nothing is known."""
        if self._score is None:
            return [1.0] * len(prompts)
        keys = [blake2b(prompt.encode(), digest_size=8).hexdigest() for prompt in prompts]
        of_step: dict[str, list[float]] = {}
        for key, of_one, own in zip(keys, figures, rewards, strict=True):
            if not math.isnan(score := self._score(of_one, own)):
                of_step.setdefault(key, []).append(score)
        for key, scores in of_step.items():
            now = sum(scores) / len(scores)
            self._scores[key] = self._memory * self._scores.get(key, now) + (1 - self._memory) * now
        return [self._weight(key) for key in keys]

    def _weight(self, key: str) -> float:
        need = self._need(self._scores[key]) if key in self._scores else 1.0
        return self._floor + (1 - self._floor) * need

    def state_dict(self) -> dict[str, float]:
        return dict(self._scores)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._scores = dict(state)
