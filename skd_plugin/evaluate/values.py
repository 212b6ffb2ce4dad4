"""From what the engines answered to named values, one a prompt. docs/eval.md says what each name means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skd_plugin.evaluate.speculation import count_blocks
from skd_plugin.evaluate.statistics import Point, Values, best_of, distinct
from skd_plugin.tasks import Task
from skd_plugin.tasks.base import further_metrics
from skd_plugin.tasks.label import Label

NGRAMS = (1, 2, 3)
DRAFT_LENS = range(1, 9)
Named = dict[str, Values | Point]


def task_values(found: Mapping[str, Any], labels: Sequence[str | None], *, k: Sequence[int], draft_len: int) -> Named:
    """Values of the prompts of one task.

    Args:
        found: the answers by measure, `scores`, `distance`, `prefixes`, `speculation`, cut down to these prompts.
        labels: the task's labels of the prompts; None where nothing says what a response is worth.
        k: of pass@k.
    """
    scorer = _Scorer(labels)
    values: Named = {}
    if "scores" in found:
        values |= _greedy(found["scores"]["greedy"], scorer) | _sampled(found["scores"]["sampled"], scorer, k)
    for text, sums in found.get("distance", {}).items():
        tokens = [one["tokens"] for one in sums]
        for name in ("kl", "student_entropy", "teacher_entropy"):
            values[f"distance/{text}/{name}"] = Values([one[name] for one in sums], tokens)
    if "prefixes" in found:
        values |= _prefixes(found["prefixes"], scorer)
    for text, kept in found.get("speculation", {}).items():
        values |= _speculation(f"speculation/{text}", kept, draft_len)
    return values


class _Scorer:
    """The task of some labels, asked once a text and prompt."""

    def __init__(self, labels: Sequence[str | None]) -> None:
        parsed = [Label.parse(label) for label in labels]
        self.task: Task | None = parsed[0].checker()
        self._answers = [label.answer for label in parsed]

    def each(self, texts: Sequence[str]) -> list[float]:
        """One text a prompt."""
        assert self.task is not None
        return [self.task.score(text, answer) for text, answer in zip(texts, self._answers, strict=True)]

    def further(self, texts: Sequence[str]) -> Mapping[str, float]:
        return further_metrics(self.task, texts, self._answers)


def _greedy(answers: Sequence[dict[str, Any]], scorer: _Scorer) -> Named:
    texts = [answer["text"] for answer in answers]
    values: Named = {}
    if scorer.task is not None:
        values[scorer.task.metric] = Values(scorer.each(texts))
        values |= {name: Point(mean, len(texts)) for name, mean in scorer.further(texts).items()}
    values |= _forms([[answer] for answer in answers])
    return {f"scores/greedy/{name}": value for name, value in values.items()}


def _sampled(answers: Sequence[Sequence[dict[str, Any]]], scorer: _Scorer, k: Sequence[int]) -> Named:
    values: Named = {}
    if scorer.task is not None:
        by_number = [scorer.each([answer["text"] for answer in row]) for row in zip(*answers, strict=True)]
        by_prompt = list(zip(*by_number, strict=True))
        values[scorer.task.metric] = Values([sum(row) / len(row) for row in by_prompt])
        name = "pass" if scorer.task.metric == "accuracy" else "best_of"
        values |= {f"{name}@{n}": Values([best_of(row, n) for row in by_prompt]) for n in k}
    values |= _forms(answers)
    return {f"scores/sampled/{name}": value for name, value in values.items()}


def _forms(answers: Sequence[Sequence[dict[str, Any]]]) -> Named:
    """Of the responses whatever they are worth; a list a prompt."""
    counts = [len(row) for row in answers]
    every = [answer["ids"] for row in answers for answer in row]
    return {
        "response_len": Values([sum(answer["length"] for answer in row) for row in answers], counts),
        "ended": Values([sum(answer["ended"] for answer in row) for row in answers], counts),
        **{f"distinct_{n}": Point(distinct(every, n), len(answers)) for n in NGRAMS},
    }


def _prefixes(found: Mapping[str, Any], scorer: _Scorer) -> Named:
    """Under each source the share of its text that the teacher went on from; 1 is the text itself."""
    values: Named = {"prefixes/teacher_alone": Values(scorer.each(found["alone"]))}
    for source in ("student", "skd", "teacher"):
        for share, texts in found[source].items():
            values[f"prefixes/{source}/{share}"] = Values(scorer.each(texts))
    return values


def _speculation(where: str, kept: Sequence[Sequence[bool]], draft_len: int) -> Named:
    tokens = [len(row) for row in kept]
    values: Named = {f"{where}/acceptance_rate": Values([sum(row) for row in kept], tokens)}
    for length in sorted({draft_len, *DRAFT_LENS}):
        blocks = [count_blocks(row, length) for row in kept]
        forwards = [one.forwards for one in blocks]
        values[f"{where}/accepted_per_block@{length}"] = Values([one.kept for one in blocks], forwards)
        values[f"{where}/tokens_per_forward@{length}"] = Values(tokens, forwards)
    return values


def of_prompts(found: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """The answers of some prompts: every list in `found` has an entry a prompt."""
    return {
        name: [value[place] for place in places] if isinstance(value, list) else of_prompts(value, places)
        for name, value in found.items()
    }
