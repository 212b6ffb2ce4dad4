"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): school problems whose solutions end with "#### " and a number."""

from __future__ import annotations

from collections.abc import Sequence

from skd_plugin.tasks import math_answers
from skd_plugin.tasks.base import TaskError, mean
from skd_plugin.tasks.dataset import DatasetTask, Row, text


class GSM8K(DatasetTask):
    name = "gsm8k"
    metric = "accuracy"
    max_new_tokens = 512  # as the next: SKD's released evaluation
    template = "Q: {question} \n\nA:"
    packages = ("math_verify",)
    dataset = "openai/gsm8k"
    subset = "main"

    def target(self, row: Row) -> tuple[str, str]:
        solution = text(row, "answer")
        answer = math_answers.after_hashes(solution)
        if answer is None:
            raise TaskError(f"a solution of {self.name} has no answer behind ####: {solution[-80:]!r}")
        return solution, answer

    def score(self, response: str, label: str) -> float:
        """1.0 if the number after "####" is right; without "####" a response is wrong, as in the release."""
        return float(math_answers.equal(math_answers.after_hashes(response), label))

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """`last_number_accuracy`: by the last number of the response, for a teacher that does not know the form."""
        right = [
            math_answers.equal(math_answers.last_number(r), label) for r, label in zip(responses, labels, strict=True)
        ]
        return {"last_number_accuracy": mean(right)}
