"""From what the engines answered to named values, one a prompt. docs/eval.md says what each name means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from skd_plugin.evaluate.estimates import Point, Values, best_of, distinct
from skd_plugin.evaluate.job import Answers, Continuations, Distance, Response
from skd_plugin.evaluate.speculation import count_blocks
from skd_plugin.tasks.base import further_metrics
from skd_plugin.tasks.label import Label

NGRAMS = (1, 2, 3)
DRAFT_LENS = range(1, 9)
Named = dict[str, Values | Point]


def task_values(answers: Sequence[Answers], labels: Sequence[Label], *, k: Sequence[int], draft_len: int) -> Named:
    """Values of the prompts of one task, by their names in eval.json.

    Args:
        answers: to each prompt; all hold the same measures.
        labels: of each prompt; where they are not of a task, nothing says what a response is worth.
        k: of pass@k.
    """
    scorer = _Scorer(labels)
    values: Named = {}
    if "greedy" in answers[0]:
        values |= _greedy([one["greedy"] for one in answers], scorer)
        values |= _sampled([one["sampled"] for one in answers], scorer, k)
    for text in answers[0].get("distance", {}):
        values |= _distance(f"distance/{text}", [one["distance"][text] for one in answers])
    if "prefixes" in answers[0]:
        values |= _prefixes([one["prefixes"] for one in answers], scorer)
    for text in answers[0].get("speculation", {}):
        values |= _speculation(f"speculation/{text}", [one["speculation"][text] for one in answers], draft_len)
    return values


class _Scorer:
    """The task of some labels, made once."""

    def __init__(self, labels: Sequence[Label]) -> None:
        self.task = labels[0].checker()
        self._answers = [label.answer for label in labels]

    def each(self, texts: Sequence[str]) -> list[float]:
        """One text a prompt."""
        assert self.task is not None
        return [self.task.score(text, answer) for text, answer in zip(texts, self._answers, strict=True)]

    def further(self, texts: Sequence[str]) -> Mapping[str, float]:
        return further_metrics(self.task, texts, self._answers)


def _greedy(responses: Sequence[Response], scorer: _Scorer) -> Named:
    texts = [response["text"] for response in responses]
    values: Named = {}
    if scorer.task is not None:
        values[scorer.task.metric] = Values(scorer.each(texts))
        values |= {name: Point(mean, len(texts)) for name, mean in scorer.further(texts).items()}
    values |= _forms([[response] for response in responses])
    return {f"scores/greedy/{name}": value for name, value in values.items()}


def _sampled(responses: Sequence[Sequence[Response]], scorer: _Scorer, k: Sequence[int]) -> Named:
    values: Named = {}
    if scorer.task is not None:
        by_number = [scorer.each([response["text"] for response in row]) for row in zip(*responses, strict=True)]
        by_prompt = list(zip(*by_number, strict=True))
        values[scorer.task.metric] = Values([sum(row) / len(row) for row in by_prompt])
        name = "pass" if scorer.task.metric == "accuracy" else "best_of"
        values |= {f"{name}@{n}": Values([best_of(row, n) for row in by_prompt]) for n in k}
    values |= _forms(responses)
    return {f"scores/sampled/{name}": value for name, value in values.items()}


def _forms(responses: Sequence[Sequence[Response]]) -> Named:
    """What can be said of responses whatever they are worth; a list a prompt."""
    counts = [len(row) for row in responses]
    every = [response["ids"] for row in responses for response in row]
    return {
        "response_len": Values([sum(response["length"] for response in row) for row in responses], counts),
        "ended": Values([sum(response["ended"] for response in row) for row in responses], counts),
        **{f"distinct_{n}": Point(distinct(every, n), len(responses)) for n in NGRAMS},
    }


def _distance(where: str, sums: Sequence[Distance]) -> Named:
    tokens = [one["tokens"] for one in sums]
    return {
        f"{where}/kl": Values([one["kl"] for one in sums], tokens),
        f"{where}/student_entropy": Values([one["student_entropy"] for one in sums], tokens),
        f"{where}/teacher_entropy": Values([one["teacher_entropy"] for one in sums], tokens),
    }


def _prefixes(continued: Sequence[Continuations], scorer: _Scorer) -> Named:
    """Under each source the share of its text that the teacher went on from; 1 is the text itself."""
    values: Named = {"prefixes/teacher_alone": Values(scorer.each([one["alone"] for one in continued]))}
    sources = {
        "student": [one["student"] for one in continued],
        "skd": [one["skd"] for one in continued],
        "teacher": [one["teacher"] for one in continued],
    }
    for source, texts in sources.items():
        for share in texts[0]:
            values[f"prefixes/{source}/{share}"] = Values(scorer.each([by_share[share] for by_share in texts]))
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
