"""Datasets of reasoning-gym as tasks: what they ask, how they are scored, and the recipes that cannot have them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from reasoning_gym.factory import DATASETS

from skd_plugin.config.task import TaskConfig
from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import load_run
from skd_plugin.prepare.task_prompts import make_task
from skd_plugin.tasks import Task, TaskError, find_task, reasoning_gym
from skd_plugin.tasks.base import split_of
from skd_plugin.tasks.label import Label
from skd_plugin.tasks.reward import score_response

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
WITHOUT_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # docs/tasks.md


def make(name: str) -> Task:
    return find_task(f"reasoning_gym:{name}")()


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))
def test_every_dataset_is_a_task(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are literals, the kept answers score 1, and an answer of any form has a score."""
    monkeypatch.chdir(tmp_path)  # programs of codeio write files
    task = make(name)
    examples = task.examples("train", 3)
    assert task.name == name and len({e.prompt for e in examples}) == 3
    assert {bool(e.reference) for e in examples} == {name not in WITHOUT_ANSWERS}
    for example in examples:
        assert isinstance(ast.literal_eval(example.label), dict)
        if example.reference:
            assert task.score(example.reference, example.label) == 1.0
            assert task.score(example.reference.replace("<answer>", ""), example.label) == 0.0
        for answer in ("banana", "-1.5", "[1, 2]", "{}", "((", "9" * 400):
            assert 0 <= task.score(f"<answer>{answer}</answer>", example.label) <= 1


def test_same_arguments_same_examples_and_splits_apart() -> None:
    task = make("chain_sum")
    train, test = (task.examples(split, 150, seed=3) for split in ("train", "test"))
    assert make("chain_sum").examples("train", 100, seed=3) == train[:100]
    assert task.examples("train", 100, seed=4) != train[:100]
    for split, examples in (("train", train), ("test", test)):
        assert {split_of(ast.literal_eval(e.label)["question"]) for e in examples} == {split}


def test_problems_that_draw_from_the_shared_random_numbers() -> None:
    assert make("list_functions").examples("train", 40) == make("list_functions").examples("train", 40)


def test_a_label_is_scored_in_another_process() -> None:
    """Where sets of strings have another order, so that the same seed would make another problem."""
    example = make("word_ladder").examples("train", 1)[0]
    code = (
        "import sys; from skd_plugin.tasks import find_task\n"
        "print(find_task('reasoning_gym:word_ladder')().score(*sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, example.reference, example.label],
        env={"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout.split()[-1]) == 1.0


def test_threads_that_come_during_the_import_wait_for_it() -> None:
    example = make("chain_sum").examples("train", 1)[0]
    code = (
        "import sys, time; from concurrent.futures import ThreadPoolExecutor; from skd_plugin.tasks import find_task\n"
        "def score(place):\n"
        "    time.sleep(place / 20)\n"  # the import takes seconds
        "    return find_task('reasoning_gym:chain_sum')().score(*sys.argv[1:])\n"
        "with ThreadPoolExecutor(8) as pool: print('SCORES', set(pool.map(score, range(8))))"
    )
    words = [sys.executable, "-c", code, example.reference, example.label]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "SCORES {1.0}" in done.stdout, done.stderr


def test_solution_of_gsm_symbolic_is_part_of_its_reference() -> None:
    reference = make("gsm_symbolic").examples("train", 1)[0].reference
    answer = reference.rpartition("<answer>")[2].removesuffix("</answer>")
    assert answer in reference.partition("<answer>")[0] and "####" not in reference


def test_figures_and_the_last_answer_counts() -> None:
    task = make("chain_sum")
    examples = task.examples("test", 4)
    right, other = examples[0].reference, "<answer>no</answer>"
    labels = [e.label for e in examples]
    assert task.score(f"{other} or {right}", labels[0]) == 1.0 and task.score(f"{right} or {other}", labels[0]) == 0.0
    assert task.metrics([right, "12", other, right], labels) == {"solved": 0.25, "answered": 0.75}


def test_a_label_finds_the_task() -> None:
    example = make("gsm_symbolic").examples("test", 1)[0]
    label = Label(example.reference, "reasoning_gym:gsm_symbolic", example.label, "</s>").to_json()
    assert score_response(example.reference, label) == 1.0


def test_parameters_of_a_file_of_ones_own(tmp_path: Path) -> None:
    head = "from skd_plugin.tasks.reasoning_gym import ReasoningGym\nclass Sums(ReasoningGym):\n"
    for parameters, terms in (("{'min_terms': 7, 'max_terms': 7}", 7), ("{'min_terms': 9, 'max_terms': 2}", None)):
        file = tmp_path / f"sums_{terms}.py"
        file.write_text(f"{head}    name, dataset, parameters = 'sums', 'chain_sum', {parameters}\nTASK = Sums\n")
        task = find_task(str(file))()
        if terms is None:
            with pytest.raises(TaskError, match=r"makes no chain_sum with parameters .*'min_terms': 9"):
                task.examples("train", 1)
        else:
            question = ast.literal_eval(task.examples("train", 1)[0].label)["question"]
            assert question.count(" + ") + question.count(" - ") == terms - 1


def test_parameters_may_be_lists(tmp_path: Path) -> None:
    file = tmp_path / "mixed.py"
    file.write_text(
        "from reasoning_gym.composite import DatasetSpec\n"
        "from skd_plugin.tasks.reasoning_gym import ReasoningGym\n"
        "class Mixed(ReasoningGym):\n    name, dataset = 'mixed', 'composite'\n"
        "    parameters = {'datasets': [DatasetSpec(n, 1, {}) for n in ('chain_sum', 'leg_counting')]}\nTASK = Mixed\n"
    )
    task = find_task(str(file))()
    examples = task.examples("train", 20)
    assert [task.score(e.reference, e.label) for e in examples] == [1.0] * 20
    assert len({"arithmetic problem" in e.prompt for e in examples}) == 2


def test_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("chain_sum")
    with pytest.raises(TaskError, match="there is no split 'dev'"):
        task.examples("dev", 1)
    with pytest.raises(TaskError, match="has no end of prompts"):
        task.examples("train", None)
    with pytest.raises(TaskError, match="makes no composite with parameters"):
        make("composite").examples("train", 1)
    with pytest.raises(TaskError, match=r"no dataset 'chainsum'; did you mean chain_sum"):
        make("chainsum")
    monkeypatch.setattr(reasoning_gym, "PATIENCE", 50)
    monkeypatch.setattr(reasoning_gym, "split_of", lambda text: "test")
    with pytest.raises(TaskError, match="has about 0 train prompts, but 5 are asked for"):
        task.examples("train", 5)


def test_a_recipe_may_take_a_checker_that_evaluates() -> None:
    config = TaskConfig(name="reasoning_gym:countdown", evaluating_checker=True)
    assert make_task(config).name == "countdown"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"reasoning-gym is not installed; pip install 'skd_plugin\[tasks\]'"):
        reasoning_gym.reasoning_gym_task.__wrapped__("chain_sum")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["skd.task.name=reasoning_gym:chainsum"], "skd.task.name: reasoning-gym has no dataset 'chainsum'"),
        (
            ["skd.task.name=reasoning_gym:countdown"],
            "the checker of countdown evaluates what the student wrote",
        ),
        (["skd.task.name=reasoning:chain_sum"], "reasoning_gym:DATASET, and a task file of your own"),
        (["skd.task.name=reasoning_gym:chain_sum", "skd.task.path=/data"], "skd.task.path is for tasks that read"),
        (["skd.task.name=reasoning_gym:chain_sum", "skd.task.template=Q"], "chain_sum has no {question} in it: 'Q'"),
        (
            ["skd.task.name=reasoning_gym:boxnet", "skd.rollout.method=supervised"],
            "has no reference, which skd.rollout.method needs",
        ),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_run(
            QUICKSTART, [*overrides, "skd.task.train_prompts=8", "skd.task.eval_prompts=2", f"skd.run_dir={tmp_path}"]
        )
    assert message in str(caught.value)
