"""The generated tasks: the same seeds give the same examples, splits are apart, and checkers know right from wrong."""

from __future__ import annotations

import hashlib
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from skd_plugin.tasks import GENERATED, TaskError, instructions, translation
from skd_plugin.tasks.arithmetic import Arithmetic, vocabulary
from skd_plugin.tasks.base import split_of
from skd_plugin.tasks.generated import GeneratedTask
from skd_plugin.tasks.instructions import OPERATIONS, Instructions, operations
from skd_plugin.tasks.summary import Summary
from skd_plugin.tasks.translation import SOURCE, Translation, is_right

PAIR = Path(__file__).parents[2] / "recipes" / "models" / "arithmetic"


@pytest.fixture(params=GENERATED, ids=lambda kind: kind.name)
def task(request: pytest.FixtureRequest) -> GeneratedTask:
    return request.param()


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_arithmetic_is_what_the_committed_models_learned() -> None:
    """Bit for bit: data, vocabulary and the tokens of the pair in recipes/models/arithmetic."""
    assert digest(Arithmetic().examples("train", 500, 0)) == "07ce65c45787b8d3"
    assert digest(Arithmetic().examples("test", 128, 0)) == "1d8571391da0ac80"
    assert digest(Arithmetic().examples("train", 64, 7)) == "081bcd18da24ecc4"
    known = json.loads((PAIR / "student" / "tokenizer.json").read_text())["model"]["vocab"]
    assert list(known)[4:] == vocabulary() == Arithmetic().vocabulary()


def test_same_arguments_same_examples_and_no_prompt_twice(task: GeneratedTask) -> None:
    for split in ("train", "test"):
        examples = task.examples(split, 200, seed=5)
        assert len({e.prompt for e in examples}) == 200
        assert type(task)().examples(split, 50, seed=5) == examples[:50]
        assert task.examples(split, 50, seed=6) != examples[:50]


def test_splits_share_no_prompt_whatever_the_seeds(task: GeneratedTask) -> None:
    """Of any example that is drawn, the prompt alone decides; the splits keep to that."""
    rng = random.Random(0)
    drawn = [task.draw(rng) for _ in range(1000)]
    sides = {side: [e for e in drawn if task.split(e) == side] for side in ("train", "test")}
    assert min(map(len, sides.values())) > 50 and len(sides["train"]) > len(sides["test"])
    for side in sides:
        assert {task.split(e) for seed in range(3) for e in task.examples(side, 100, seed)} == {side}


def test_references_are_right_and_other_answers_are_not(task: GeneratedTask) -> None:
    examples = task.examples("test", 60) + task.examples("train", 60)
    assert [task.score(e.reference, e.label) for e in examples] == [1.0] * 120
    for example, other in pairwise(examples):
        if example.label != other.label:
            assert 0 <= task.score(other.reference, example.label) < 1
        for response in ("", " ", " .", "<pad>", example.prompt):
            assert 0 <= task.score(response, example.label) < 1


def test_metrics_of_references_are_one(task: GeneratedTask) -> None:
    examples = task.examples("test", 40)
    found = task.metrics([e.reference for e in examples], [e.label for e in examples])
    assert found == {name: pytest.approx(1.0) for name in found} and task.metric not in found
    nothing = task.metrics([""] * 40, [e.label for e in examples])
    assert nothing == {name: pytest.approx(0.0) for name in found}


def test_every_token_is_in_the_vocabulary_and_responses_are_short(task: GeneratedTask) -> None:
    tokens = task.vocabulary()
    known = set(tokens)
    assert len(known) == len(tokens)
    for example in task.examples("train", 400, seed=3) + task.examples("test", 100, seed=3):
        if not isinstance(task, Arithmetic):  # whose numbers are digits; tests/unit/test_tasks.py
            assert {f" {word}" for word in example.reference.split()} <= known
            first, *rest = example.prompt.split(" ")
            assert {first, *(f" {word}" for word in rest)} <= known
            assert example.reference.startswith(" ") and "  " not in example.prompt + example.reference
        assert len(example.reference.split()) < task.max_new_tokens <= 96


def test_what_cannot_be_drawn(task: GeneratedTask) -> None:
    with pytest.raises(TaskError, match="there is no split 'dev'; a task has train and test"):
        task.examples("dev", 1)
    with pytest.raises(TaskError, match="has no end of prompts"):
        task.examples("train", None)


def test_more_prompts_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Instructions()
    monkeypatch.setattr(instructions, "WORDS", ["ant", "bag", "bed", "bell", "bird"])
    monkeypatch.setattr(instructions, "LENGTH", (4, 4))
    monkeypatch.setattr(instructions, "STEPS", (1, 1))
    monkeypatch.setattr(instructions, "OPERATIONS", {"reverse": OPERATIONS["reverse"]})
    everything = 5 * 4 * 3 * 2 * 2
    assert len(task.examples("train", everything)) == everything
    with pytest.raises(TaskError, match=f"has about {everything} train prompts, but {everything + 1} are asked for"):
        task.examples("train", everything + 1)


# --- translation ---


def test_every_synonym_and_order_is_right() -> None:
    label = json.dumps(
        [["soon the dog|hound will see|spot it", "the dog|hound will see|spot it soon"], ["and"], ["he sat"]]
    )
    for time, dog, see in (("front", "dog", "spot"), ("end", "hound", "see")):
        clause = f"the {dog} will {see} it"
        text = (f"soon {clause}" if time == "front" else f"{clause} soon") + " and he sat ."
        assert is_right(f" {text}", label) and Translation().score(text, label) == 1.0
    for wrong in ("soon the dog will see it soon and he sat .", "the dog will see it and he sat .", "soon the dog"):
        assert not is_right(wrong, label) and Translation().score(wrong, label) < 1


def test_a_nearly_right_translation_scores_more() -> None:
    label = json.dumps([["the big|large dog|hound sees our cat"]])
    close, far = (Translation().score(text, label) for text in ("the large hound see our cat .", "two boys ."))
    assert 0.6 < close < 1 and far < 0.3


@pytest.mark.parametrize(
    ("tense", "negated", "plural", "words"),
    [
        ("present", False, True, ["see|spot"]),
        ("present", False, False, ["sees|spots"]),
        ("past", False, True, ["saw|spotted"]),
        ("future", False, False, ["will", "see|spot"]),
        ("present", True, False, ["does", "not", "see|spot"]),
        ("present", True, True, ["do", "not", "see|spot"]),
        ("past", True, False, ["did", "not", "see|spot"]),
        ("future", True, True, ["will", "not", "see|spot"]),
    ],
)
def test_verbs_agree(tense: str, negated: bool, plural: bool, words: list[str]) -> None:
    assert translation._verb([("see", "saw"), ("spot", "spotted")], tense, negated, plural) == words


def test_plurals() -> None:
    pairs = {"dog": "dogs", "torch": "torches", "church": "churches", "wolf": "wolves", "thief": "thieves"}
    assert {word: translation._plural(word) for word in pairs} == pairs


def test_source_words_are_no_target_words_and_mean_one_thing() -> None:
    assert len(set(SOURCE.values())) == len(SOURCE)
    target = set(Translation().vocabulary()) - {f" {word}" for word in SOURCE.values()}
    assert len(target) + len(SOURCE) == len(Translation().vocabulary())


# --- summary ---


def test_summary_has_what_was_agreed_and_not_what_was_proposed() -> None:
    for example in Summary().examples("train", 200):
        words, facts = example.prompt.split(), json.loads(example.label)["facts"]
        assert all(fact in words or fact in ("broken", "happy", "worried") for fact in facts)
        if "is bad , what about" in example.prompt:
            refused, agreed = words[words.index("bad") - 2], words[words.index("bad") + 4]
            assert agreed in facts and refused != agreed
            sentence = next(s for s in example.reference.split(" . ") if agreed in s)
            assert refused not in sentence


def test_any_wording_of_a_summary_is_right_and_a_wrong_fact_costs() -> None:
    task = Summary()
    for example in task.examples("test", 20):
        events = json.loads(example.label)["events"]
        for choice in (0, -1):
            text = " ".join(f"{wordings[choice]} ." for wordings in events)
            assert task.score(text, example.label) == 1.0
        assert task.score(f" {events[0][0]} .", example.label) < 1.0  # the other events are missing
    label = json.dumps({"events": [["ann lends tom the bike"]], "facts": ["ann", "tom", "bike"]})
    assert task.score("ann lends tom the tent .", label) == pytest.approx(0.8)  # an LCS of 4 of 5 words both ways
    assert task.metrics(["ann lends tom the tent ."], [label])["fact_recall"] == pytest.approx(2 / 3)


# --- instructions ---


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("reverse", "map sun cat"), ("sort", "cat map sun"), ("first", "sun map"), ("last", "cat sun"),
        ("swap", "map sun cat"), ("rotate", "sun map cat"), ("back", "map cat sun"), ("double", "cat sun map map"),
        ("replace", "cat owl map"), ("append", "cat sun map owl"), ("prepend", "owl cat sun map"),
        ("delete", "cat map"),
    ],
)  # fmt: skip
def test_operations(name: str, result: str) -> None:
    words = ["cat", "sun", "map"]
    assert " ".join(OPERATIONS[name][1](words, "sun", "owl")) == result
    assert words == ["cat", "sun", "map"]


def test_test_instructions_have_a_pair_that_training_never_has() -> None:
    def pairs(split: str) -> list[set[tuple[str, str]]]:
        named = [operations(e.prompt) for e in Instructions().examples(split, 2000)]
        return [set(pairwise(names)) for names in named]

    trained, tested = set().union(*pairs("train")), pairs("test")
    assert len(trained) > 50 and all(some - trained for some in tested)
    single = {names[0] for e in Instructions().examples("train", 500) if len(names := operations(e.prompt)) == 1}
    assert single == set(OPERATIONS)


def test_steps_of_an_instruction_follow_each_other() -> None:
    for example in Instructions().examples("train", 200):
        steps = [part.split(" : ")[1] for part in example.reference.split(" . ")[:-1]]
        assert len(steps) == len(operations(example.prompt)) and steps[-1] == example.label
        assert all(step.split() for step in steps)


def test_split_of_is_fixed() -> None:
    """Data that models were trained on must not move to the other side."""
    assert [split_of(text) for text in ("a", "b", "h", "tom has 3 coins .")] == ["train", "train", "test", "train"]
    assert sum(split_of(str(n)) == "test" for n in range(8000)) == pytest.approx(1000, abs=150)
