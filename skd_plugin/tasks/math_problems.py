r"""Mathematical instructions with answers in \boxed{}: trained on UltraInteract, tested on that and on other sets.

UltraInteract (Yuan et al. 2024, arXiv 2404.02078) has the form of the prompt in its rows; the others are put into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from skd_plugin.tasks import math_answers
from skd_plugin.tasks.base import mean
from skd_plugin.tasks.dataset import DatasetTask, Row, column, text

PROMPT = (
    "Solve the following math problem step-by-step.\n"
    "Simplify your answer as much as possible. Present your final answer as \\boxed{{Your Answer}}.\n"
)


class BoxedTask(DatasetTask):
    """Problems whose response ends with a boxed answer."""

    metric = "accuracy"
    max_new_tokens = 1024  # SKD's released evaluation
    packages = ("math_verify",)

    def score(self, response: str, label: str) -> float:
        r"""1.0 if the last \boxed{} holds an answer equal to the label."""
        return float(math_answers.equal(math_answers.boxed(response), label))

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        r"""`answered`: share of the responses with a \boxed{}, right or wrong."""
        return {"answered": mean([math_answers.boxed(response) is not None for response in responses])}


class UltraInteract(BoxedTask):
    """The chain-of-thought part for mathematics; one prompt in eight is for the test."""

    name = "ultrainteract"
    template = "{instruction}"
    dataset = "openbmb/UltraInteract_sft"
    splits = MappingProxyType({"train": "train"})
    cut_by_hash = True

    def target(self, row: Row) -> tuple[str, str] | None:
        response = text(row, "response")
        answer = math_answers.boxed(response)
        return (response, answer) if column(row, "task") == "Math_CoT" and answer else None


class Math500(BoxedTask):
    """500 problems of MATH (Hendrycks et al. 2021, arXiv 2103.03874), chosen by Lightman et al. 2023."""

    name = "math500"
    template = PROMPT + "{problem}"
    dataset = "HuggingFaceH4/MATH-500"
    splits = MappingProxyType({"test": "test"})

    def target(self, row: Row) -> tuple[str, str]:
        return text(row, "solution"), text(row, "answer")


class GSMPlus(BoxedTask):
    """GSM-Plus (Li et al. 2024, arXiv 2402.19255), without the problems that have no answer."""

    name = "gsm_plus"
    template = PROMPT + "{question}"
    dataset = "qintongli/GSM-Plus"
    splits = MappingProxyType({"test": "test"})

    def target(self, row: Row) -> tuple[str, str] | None:
        answer = str(column(row, "answer")).strip()
        return (text(row, "solution"), answer) if math_answers.last_number(answer) else None


class ASDiv(BoxedTask):
    """ASDiv (Miao et al. 2020, arXiv 2106.15772); the unit after a number, "9 (apples)", is no part of the answer."""

    name = "asdiv"
    template = PROMPT + "{body} {question}"
    dataset = "EleutherAI/asdiv"
    splits = MappingProxyType({"test": "validation"})

    def target(self, row: Row) -> tuple[str, str]:
        answer = text(row, "answer").split("(")[0].strip()
        return f"\\boxed{{{answer}}}", answer
