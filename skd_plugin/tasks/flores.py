"""Flores-200 (NLLB Team 2022, arXiv 2207.04672), Assamese to English: the paper's low-resource translation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from skd_plugin.tasks import scorers
from skd_plugin.tasks.dataset import DatasetTask, Row, text

SOURCE, TARGET = "asm_Beng", "eng_Latn"


class Flores(DatasetTask):
    """Trained on `dev` (997 sentences), tested on `devtest` (1,012)."""

    name = "flores"
    metric = "chrf"
    max_new_tokens = 256  # SKD's released evaluation
    packages = ("sacrebleu",)
    template = (
        f"Translate Assamese sentence into English. This is the Assamese sentence: {{sentence_{SOURCE}}} Here is the "
        "English translation:"
    )
    dataset = "openlanguagedata/flores_plus"
    splits = MappingProxyType({"train": "dev", "test": "devtest"})

    def rows(self, split: str) -> Iterable[Row]:
        """The Hub has a subset a language, whose rows belong together by `id`; a folder has both in a row."""
        if self._path is not None:
            return super().rows(split)
        source, target = (
            {row["id"]: row["text"] for row in self.hub_rows(split, language)} for language in (SOURCE, TARGET)
        )
        return [
            {f"sentence_{SOURCE}": text, f"sentence_{TARGET}": target[key]}
            for key, text in source.items()
            if key in target
        ]

    def target(self, row: Row) -> tuple[str, str]:
        return text(row, f"sentence_{TARGET}"), text(row, f"sentence_{TARGET}")

    def score(self, response: str, label: str) -> float:
        return scorers.chrf(response.strip(), [label])

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        return scorers.of_translations([response.strip() for response in responses], labels)
