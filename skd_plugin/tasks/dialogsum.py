"""DialogSum (Chen et al. 2021, arXiv 2105.06762): the dialogue alone is the prompt, as in SKD's release."""

from __future__ import annotations

import json
from collections.abc import Sequence

from skd_plugin.tasks import scorers
from skd_plugin.tasks.base import Example, mean
from skd_plugin.tasks.dataset import DatasetTask, Row, text


class DialogSum(DatasetTask):
    """A test dialogue has three summaries; a response is compared with the one most like it."""

    name = "dialogsum"
    metric = "rouge_l"
    max_new_tokens = 128  # SKD's released evaluation
    packages = ("rouge_score",)
    template = "{dialogue}"
    dataset = "knkarthick/dialogsum"

    def target(self, row: Row) -> tuple[str, str]:
        summary = text(row, "summary")
        return summary, json.dumps([summary])

    def merge(self, known: Example, again: Example) -> Example:
        return known._replace(label=json.dumps(json.loads(known.label) + json.loads(again.label)))

    def score(self, response: str, label: str) -> float:
        return scorers.rouge(response, json.loads(label))["rouge_l"]

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        scores = [scorers.rouge(r, json.loads(label)) for r, label in zip(responses, labels, strict=True)]
        return {name: mean([score[name] for score in scores]) for name in ("rouge_1", "rouge_2")}
