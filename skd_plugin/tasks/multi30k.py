"""Multi30k (Elliott et al. 2016, arXiv 1605.00459), English to German: captions of pictures, translated by people."""

from __future__ import annotations

from collections.abc import Sequence

from skd_plugin.tasks import scorers
from skd_plugin.tasks.dataset import DatasetTask, Row, text


class Multi30k(DatasetTask):
    """29,000 pairs to train, the 1,000 of 2016 to test. Of a source that comes twice the first pair is kept."""

    name = "multi30k"
    metric = "chrf"
    max_new_tokens = 64
    packages = ("sacrebleu",)
    template = (
        "Translate English sentence into German. This is the English sentence: {en} Here is the German translation:"
    )
    dataset = "bentrevett/multi30k"

    def target(self, row: Row) -> tuple[str, str]:
        german = text(row, "de")
        return german, german

    def score(self, response: str, label: str) -> float:
        return scorers.chrf(response.strip(), [label])

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        return scorers.of_translations([response.strip() for response in responses], labels)
