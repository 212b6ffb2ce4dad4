"""The arithmetic task: its stories are sound, its splits apart, and its checker strict."""

from __future__ import annotations

import re

import pytest

from skd_plugin.tasks import TASKS, Task, arithmetic, find_task
from skd_plugin.tasks.arithmetic import MAX_VALUE, Arithmetic, vocabulary
from skd_plugin.tasks.label import Label
from skd_plugin.tasks.reward import score_response

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+) \.")


@pytest.fixture
def task() -> Arithmetic:
    return Arithmetic()


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_has_the_protocol(name: str) -> None:
    made: Task = TASKS[name]()
    assert made.name == name and made.metric in ("accuracy", "chrf", "rouge_l")
    assert made.max_new_tokens >= 1 and isinstance(made.packages, tuple)
    assert find_task(name) is TASKS[name]


def test_same_arguments_same_examples(task: Arithmetic) -> None:
    assert task.examples("test", 30, seed=5) == task.examples("test", 30, seed=5)
    assert task.examples("test", 30, seed=5) == task.examples("test", 50, seed=5)[:30]
    assert task.examples("test", 30, seed=5) != task.examples("test", 30, seed=6)


def test_splits_share_no_story_whatever_the_seeds(task: Arithmetic, monkeypatch: pytest.MonkeyPatch) -> None:
    """In so small a world that different seeds do make the same stories."""
    for name in ("NAMES", "ITEMS", "GAIN", "LOSE"):
        monkeypatch.setattr(arithmetic, name, getattr(arithmetic, name)[:1])
    monkeypatch.setattr(Arithmetic, "num_steps", (1, 1))
    train, again = ({e.prompt for e in task.examples("train", 3000, seed)} for seed in (0, 1))
    test, more = ({e.prompt for e in task.examples("test", 600, seed)} for seed in (0, 2))
    assert train & again and test & more, "the world is too large for this test"
    assert not (train | again) & (test | more)


def test_stories_add_up(task: Arithmetic) -> None:
    """The steps of a reference follow the story's numbers, one after the other, to its label."""
    for example in task.examples("train", 300):
        start, *amounts = map(int, re.findall(r"\d+", example.prompt))
        steps = STEP.findall(example.reference)
        assert task.num_steps[0] <= len(steps) == len(amounts) <= task.num_steps[1]
        value = start
        for amount, (left, sign, right, result) in zip(amounts, steps, strict=True):
            assert (int(left), int(right)) == (value, amount)
            value = value + amount if sign == "+" else value - amount
            assert int(result) == value and 0 < value <= MAX_VALUE
        assert str(value) == example.label


def test_reference_scores_one_and_a_wrong_answer_zero(task: Arithmetic) -> None:
    for example in task.examples("test", 100):
        assert task.score(example.reference, example.label) == 1.0
        wrong = example.reference.removesuffix(example.label) + str(int(example.label) + 1)
        assert task.score(wrong, example.label) == 0.0
        assert task.step_validity(example.reference) == 1.0


def test_a_wrong_step_spoils_the_answer(task: Arithmetic) -> None:
    """Continued from a wrong result, the story ends at another number."""
    for example in task.examples("test", 100):
        steps = STEP.findall(example.reference)
        value = int(steps[0][3]) + 10  # the first result is wrong, the rest goes on from it
        for _, sign, amount, _ in steps[1:]:
            value = value + int(amount) if sign == "+" else value - int(amount)
        assert task.score(f" ... . the answer is {value}", example.label) == 0.0
        first = steps[0]
        broken = example.reference.replace(f"= {first[3]} .", f"= {int(first[3]) + 10} .", 1)
        assert task.step_validity(broken) < 1.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (" the answer is 73", 1.0),
        (" first 47 + 38 = 85 . in total the answer is 73 ", 1.0),
        (" the answer is 73 .", 0.0),
        (" the answer is 7", 0.0),
        (" the answer is 173", 0.0),
        (" the answer is 73 the answer is 74", 0.0),
        (" 73", 0.0),
        ("", 0.0),
    ],
)
def test_score_wants_the_answer_at_the_end(task: Arithmetic, response: str, score: float) -> None:
    assert task.score(response, "73") == score


def test_step_validity_is_a_share(task: Arithmetic) -> None:
    assert task.step_validity("1 + 2 = 3 . 9 - 4 = 5 . 2 + 2 = 5 . 1 - 1 = 1") == 0.5
    assert task.step_validity("nothing") == 0.0


def test_every_word_is_in_the_vocabulary(task: Arithmetic) -> None:
    tokens = set(vocabulary())
    for example in task.examples("train", 200):
        words = re.findall(r" ?[a-z]+| ?[0-9]| ?[.?+=-]", example.prompt + example.reference)
        assert "".join(words) == example.prompt + example.reference
        assert set(words) <= tokens


@pytest.mark.parametrize(("answer", "score"), [("73", 1.0), ("74", 0.0)])
def test_a_response_is_scored_by_the_task_of_its_label(answer: str, score: float) -> None:
    label = Label(" the answer is 73", "arithmetic", "73", "</s>").to_json()
    assert score_response(f" so the answer is {answer}", label) == score
    with pytest.raises(ValueError, match="their label is '73'"):
        score_response("73", "73")


def test_reference_of_a_label() -> None:
    """Of our own label, of a user's JSON, of a plain text (also one that is JSON itself), and of none."""
    ours = Label(" the answer is 73", "arithmetic", "73", "</s>")
    assert Label.parse(ours.to_json()) == ours
    assert Label.parse('{"reference": "yes", "answer": 1}').reference == "yes"
    for text in ("a plain text", "42", '{"name": "a JSON answer"}', "{"):
        assert Label.parse(text).reference == text
    for nothing in ("", None, 42, ["a"], '{"reference": null}', '{"reference": ""}'):
        assert Label.parse(nothing).reference is None
