"""Every dataset of reasoning-gym as a task: `skd.task.name: reasoning_gym:gsm_symbolic`.

Its datasets make their problems from a seed and check answers themselves; see github.com/open-thought/reasoning-gym.
A label is the problem with all that its checker needs, as a Python literal: there are tuples and sets among it, and
its seed would not do, because some datasets go by the order of sets of strings, which another process has otherwise.
"""

from __future__ import annotations

import ast
import pickle
import random
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from math import isfinite
from threading import Lock
from types import MappingProxyType
from typing import Any, ClassVar

from skd_plugin.tasks.base import Example, Task, TaskError, mean, split_of
from skd_plugin.tasks.generated import first_of
from skd_plugin.tasks.judge import NoAnswer, ask

PREFIX = "reasoning_gym:"
Entry = dict[str, Any]  # question, answer, metadata
CHECK = "skd_plugin.tasks.reasoning_gym:check"
CHUNK = 64  # problems of one seed
PATIENCE = 4096  # problems without a new one of the split, after which there seem to be no more
# What its checkers raise at an answer in a form they do not read, e.g. prime_factorization at a word.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Datasets whose checker evaluates an answer as Python or as a formula of sympy's.
EVALUATING = frozenset(
    "binary_matrix bitwise_arithmetic countdown intermediate_integration n_queens number_sorting "
    "polynomial_multiplication puzzle24 simple_integration spiral_matrix string_insertion".split()
)
_IMPORTING = Lock()


class ReasoningGym(Task):
    """What the datasets share; a subclass names one, and may set its parameters.

    Args:
        template: form of the prompt, with `{question}` in it; None is the task's own.
    """

    dataset: ClassVar[str]  # its name in reasoning-gym
    parameters: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # of its generator, e.g. {"min_terms": 4}
    metric = "score"
    max_new_tokens = 512
    packages = ("reasoning_gym",)
    options = ("template",)

    template = "{question}\nGive the answer between <answer> and </answer>."

    def __init__(self, template: str | None = None) -> None:
        self.template = template or self.template
        if "{question}" not in self.template:
            raise TaskError(f"the template of {self.name} has no {{question}} in it: {self.template!r}")

    def examples(self, split: str, count: int | None, seed: int = 0) -> list[Example]:
        entries = self._entries(f"{split}/{seed}")
        drawn = ((split_of(entry["question"]), self._example(entry)) for entry in entries)
        return first_of(self.name, split, count, drawn, PATIENCE)

    def _example(self, entry: Entry) -> Example:
        prompt = self.template.replace("{question}", entry["question"])
        return Example(prompt, _reference(entry), repr(_literal(entry)))

    def _entries(self, stream: str) -> Iterator[Entry]:
        rng = random.Random(f"{self.name}/{stream}")
        while True:
            problems = _problems(self.dataset, self.parameters, rng.getrandbits(31))
            for index in range(CHUNK):
                with _same_random_numbers(f"{stream}/{rng.random()}"):
                    entry = problems[index]
                yield entry

    def score(self, response: str, label: str) -> float:
        """reasoning-gym's own score of what stands in the last <answer> of the response, in [0, 1]; 0 without one.

        Some of its checkers give a part of 1 to an answer that is nearly right, or right in another form.
        """
        answer = _answer(response)
        if answer is None:
            return 0.0
        try:
            return ask(CHECK, self.dataset, b64encode(pickle.dumps(dict(self.parameters))).decode(), answer, label)
        except NoAnswer:
            return 0.0

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """`solved`: share of responses with the full score; `answered`: share that have an answer."""
        pairs = list(zip(responses, labels, strict=True))
        return {
            "solved": mean([float(self.score(response, label) == 1) for response, label in pairs]),
            "answered": mean([float(_answer(response) is not None) for response in responses]),
        }


def before_the_wall() -> None:
    _library()


def check(dataset: str, parameters: str, answer: str, label: str) -> float:
    """reasoning-gym's word on an answer; asked for in a process of its own (judge.py), because some of its checkers
    evaluate what they are given.
    """
    try:
        score = float(_checker(dataset, parameters).score_answer(answer, ast.literal_eval(label)))
    except UNREADABLE:
        return 0.0
    return min(max(score, 0.0), 1.0)


@cache  # some datasets take seconds to make
def _checker(dataset: str, parameters: str) -> Any:
    return _problems(dataset, pickle.loads(b64decode(parameters)), seed=0)


def _literal(value: Any) -> Any:
    """With its containers, but numbers and texts of numpy's as Python's own, and what is no literal (a Fraction of
    gsm_symbolic's variables) as text.
    """
    if isinstance(value, dict):
        return {_literal(key): _literal(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_literal(one) for one in value)
    plain = value.item() if hasattr(value, "item") else value  # of a scalar of numpy's
    is_literal = plain is None or isinstance(plain, str | int) or (isinstance(plain, float) and isfinite(plain))
    return plain if is_literal else str(plain)


@contextmanager
def _same_random_numbers(key: str) -> Iterator[None]:
    """Two of the datasets (codeio, list_functions) also draw from the random numbers that all of Python shares."""
    kept = random.getstate()
    random.seed(key)
    try:
        yield
    finally:
        random.setstate(kept)


def _reference(entry: Entry) -> str:
    """The answer, after the written solution where there is one (gsm_symbolic); empty where no answer is kept."""
    if entry["answer"] is None:
        return ""
    solution, _, _ = entry["metadata"].get("answer_cot", "").partition("####")
    return f"{solution}<answer>{entry['answer']}</answer>"


def _answer(response: str) -> str | None:
    return _library().utils.extract_answer(response)


def _problems(dataset: str, parameters: Mapping[str, Any], seed: int) -> Any:
    library = _library()
    try:
        return library.create_dataset(dataset, seed=seed, size=CHUNK, **parameters)
    except (AssertionError, TypeError, ValueError) as error:  # it checks its parameters by assertions
        raise TaskError(f"reasoning-gym makes no {dataset} with parameters {dict(parameters)}: {error}") from error


def _library() -> Any:
    """OpenRLHF scores in several threads: one that met an import that has begun would see half of the datasets."""
    with _IMPORTING:
        import reasoning_gym
        import reasoning_gym.utils

        return reasoning_gym


@cache
def reasoning_gym_task(dataset: str) -> type[Task]:
    """Raises TaskError: reasoning-gym is not installed, or has no such dataset."""
    if find_spec("reasoning_gym") is None:
        raise TaskError("reasoning-gym is not installed; pip install 'skd_plugin[tasks]'")
    known = _library().factory.DATASETS
    if dataset not in known:
        near = get_close_matches(dataset, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "its gallery lists them"
        raise TaskError(f"reasoning-gym has no dataset '{dataset}'; {hint}")
    return type("".join(map(str.title, dataset.split("_"))), (ReasoningGym,), {"name": dataset, "dataset": dataset})
