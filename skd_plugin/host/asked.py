"""Prompts on their way to the engines, each with how the responses to it are sampled.

OpenRLHF hands a prompt on to an engine's actor as it is, so what travels with it needs no word to the engine before:
an engine may have requests of several steps, or of a step and an evaluation, under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from skd_plugin.engine.sampling_rule import SamplingRule


@dataclass(frozen=True)
class SampledBy:
    """How the responses of a step, or of an evaluation, are sampled."""

    rule: SamplingRule
    seed: int  # of the run and the step


@dataclass(frozen=True)
class AskedSample:
    """One response that is asked for; the same (seed, prompt, number) gives the same tokens."""

    prompt: str  # a `PairedPrompt` where the teacher has its own
    by: SampledBy
    number: int = 1  # among the responses to this prompt that are sampled by the same


@dataclass(frozen=True)
class AskedPrompt:
    """What the generator sends in place of a prompt."""

    prompt: str
    by: SampledBy
    before: int = 0  # how often the prompt was sent before, to be sampled by the same

    def samples(self, number: int) -> list[AskedSample]:
        """The responses that are asked for now, so many."""
        first = 1 + self.before * number
        return [AskedSample(self.prompt, self.by, first + index) for index in range(number)]


class Asking:
    """Sends prompts to be sampled by the same."""

    def __init__(self, by: SampledBy) -> None:
        self._by = by
        self._sent: Counter[str] = Counter()

    def prompts(self, prompts: Sequence[str]) -> list[AskedPrompt]:
        asked = []
        for prompt in prompts:
            asked.append(AskedPrompt(prompt, self._by, self._sent[prompt]))
            self._sent[prompt] += 1
        return asked
