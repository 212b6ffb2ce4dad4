"""Tasks in a recipe: what is written for the host, in which proportions, and what is refused with which words."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skd_plugin.check.dry_run import one_step
from skd_plugin.config.run import PromptRow, Run
from skd_plugin.config.schema import SKDConfig, parse_skd
from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import PromptForm
from skd_plugin.prepare.load_run import load_models, load_run
from skd_plugin.prepare.task_prompts import draw_prompts, longest_response, task_options
from skd_plugin.tasks import TASKS, TaskError, find_task
from skd_plugin.tasks.label import Label, Sampling
from skd_plugin.tasks.mixing import parts, shares
from skd_plugin.tasks.reward import score_response

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
AS_IT_IS = PromptForm("input")
SMALL = [
    "openrlhf.rollout.batch_size=2", "openrlhf.rollout.micro_batch_size=1",
    "openrlhf.train.batch_size=2", "openrlhf.train.micro_batch_size=1",
]  # fmt: skip
OWN_TASK = """
import random
from skd_plugin.tasks import Example, Task

class Echo(Task):
    name, metric, max_new_tokens = "echo", "accuracy", 7

    def examples(self, split, count, seed=0):
        rng = random.Random(f"{split}/{seed}")
        return [Example(f"tom has {split == 'test'} {n} coins .", " 1", str(n)) for n in range(count)]

    def score(self, response, label):
        return float(response.strip() == label)

TASK = Echo
"""


class Words:
    """A tokenizer with a token a word."""

    eos_token = "</s>"

    def __call__(self, texts: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[text.split() for text in texts])

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> str:
        return "<user> " * 20 + chat[0]["content"]


def config(tmp_path: Path, **sections: Any) -> SKDConfig:
    return parse_skd({"teacher": {"model_name_or_path": "t"}, "run_dir": str(tmp_path), **sections})


def drawn(tmp_path: Path, given: int | None = None, **sections: Any) -> dict[str, list[PromptRow]]:
    return draw_prompts(config(tmp_path, **sections), AS_IT_IS, Words(), 200, given)


def by_task(rows: Iterable[PromptRow]) -> Counter[str]:
    return Counter(row["datasource"] for row in rows)


def several(*tasks: str, **common: Any) -> list[dict[str, Any]]:
    return [{"name": name, "train_prompts": 60, "eval_prompts": 5} | common for name in tasks]


# --- proportions ---


def test_shares_by_hand() -> None:
    assert shares([1, 3]) == [0.25, 0.75]
    assert shares([100, 1, 0], 2.0) == pytest.approx([10 / 11, 1 / 11, 0])
    assert shares([100, 1], 1e9) == pytest.approx([0.5, 0.5])


def test_parts_are_whole_and_add_up() -> None:
    assert parts(10, [0.26, 0.74]) == [3, 7] and sorted(parts(10, [1 / 3, 1 / 3, 1 / 3])) == [3, 3, 4]
    rng = random.Random(0)
    for _ in range(200):
        of = shares([rng.random() for _ in range(rng.randint(1, 6))])
        total = rng.randint(0, 1000)
        cut = parts(total, of)
        assert sum(cut) == total and all(abs(n - total * share) < 1 for n, share in zip(cut, of, strict=True))


def test_without_weights_every_prompt_is_there_once(tmp_path: Path) -> None:
    tasks = several("arithmetic", "instructions") + several("summary", train_prompts=30)
    data = drawn(tmp_path, tasks=tasks)
    assert by_task(data["train"]) == {"arithmetic": 60, "instructions": 60, "summary": 30}
    assert by_task(data["test"]) == {"arithmetic": 5, "instructions": 5, "summary": 5}
    rows = data["train"]
    assert len({row["input"] for row in rows}) == 150
    assert len({row["datasource"] for row in rows[:30]}) == 3, "the tasks are not mixed"


def test_weights_and_temperature(tmp_path: Path) -> None:
    """The size of the whole stays; a task that needs more prompts than it has repeats them, evenly."""
    tasks = [t | {"weight": w} for t, w in zip(several("arithmetic", "instructions"), (1, 4), strict=True)]
    train = drawn(tmp_path, tasks=tasks)["train"]
    assert by_task(train) == {"arithmetic": 24, "instructions": 96}
    repeated = Counter(row["input"] for row in train if row["datasource"] == "instructions")
    assert len(repeated) == 60 and set(repeated.values()) == {1, 2}
    train = drawn(tmp_path, tasks=tasks, mix_temperature=2.0)["train"]
    assert by_task(train) == {"arithmetic": 40, "instructions": 80}


def test_one_task_is_a_list_of_one(tmp_path: Path) -> None:
    (task,) = several("arithmetic")
    data = drawn(tmp_path, task=task)
    assert data == drawn(tmp_path, tasks=[task])
    assert [row["input"] for row in data["train"]] == [e.prompt for e in TASKS["arithmetic"]().examples("train", 60)]


def test_a_task_for_evaluation_only(tmp_path: Path) -> None:
    data = tmp_path / "gsm"
    data.mkdir()
    (data / "test.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "#### 2"}\n')
    tasks = several("arithmetic")
    tasks += [
        {"name": "gsm8k", "path": str(data), "train_prompts": 0, "eval_prompts": "full", "template": "say {question}"}
    ]
    data = drawn(tmp_path, tasks=tasks)
    assert by_task(data["train"]) == {"arithmetic": 60} and by_task(data["test"]) == {"arithmetic": 5, "gsm8k": 2}
    assert {row["input"] for row in data["test"]} >= {"say a", "say b"}


def test_labels_lead_to_the_checker_of_their_task(tmp_path: Path) -> None:
    for row in drawn(tmp_path, tasks=several("arithmetic", "translation"))["test"]:
        reference = json.loads(row["label"])["reference"]
        assert score_response(reference, row["label"]) == 1.0
        assert Label.parse(row["label"]).checker().name == row["datasource"]


def test_a_run_without_held_out_prompts_is_not_evaluated(tmp_path: Path) -> None:
    host = task_options(config(tmp_path, tasks=several("arithmetic", eval_prompts=0)), {})
    assert "eval.dataset" not in host and "data.prompt_dataset" in host
    assert "eval.dataset" in task_options(config(tmp_path, tasks=several("arithmetic")), {})


@pytest.mark.parametrize("names", [(), ("agent",), ("model",), ("agent", "model")], ids=str)
def test_rewards_of_the_users_own_take_the_checkers_place(tmp_path: Path, names: tuple[str, ...]) -> None:
    keys = {"agent": "train.agent_func_path", "model": "reward.model_name_or_path"}
    options = task_options(config(tmp_path, tasks=several("arithmetic")), {keys[name]: "own" for name in names})
    assert ("reward.remote_url" in options) == (not names)
    assert ("eval.dataset" in options) == ("model" not in names)


def test_longest_response_of_the_tasks(tmp_path: Path) -> None:
    both = config(tmp_path, tasks=several("translation", "arithmetic"))
    assert longest_response(both, None) == 96 and longest_response(both, 50) == 50
    assert longest_response(config(tmp_path), None) is None and longest_response(config(tmp_path), 50) == 50
    own = config(tmp_path, tasks=[*several("translation"), *several("arithmetic", max_new_tokens=120)])
    assert longest_response(own, 50) == 120


@pytest.mark.parametrize(
    ("given", "limits"), [(None, {"translation": 64, "arithmetic": None, "summary": 12}), (50, {"summary": 12})]
)
def test_a_task_among_several_has_its_own_limit_and_k(tmp_path: Path, given: int | None, limits: dict) -> None:
    """A limit is in the label where it is lower than the run's longest, a K where the task names one."""
    tasks = [*several("translation", "arithmetic"), *several("summary", max_new_tokens=12, top_k=4)]
    for rows in drawn(tmp_path, given, tasks=tasks).values():
        for line in rows:
            expected = limits.get(line["datasource"]), 4 if line["datasource"] == "summary" else None
            assert Label.parse(line["label"]).sampling[::-1] == expected


def test_labels_without_anything_of_their_own(tmp_path: Path) -> None:
    data = drawn(tmp_path, task=several("arithmetic")[0])
    assert all("sampling" not in json.loads(line["label"]) for line in data["train"])
    for label in (None, 3, "a reference", '{"sampling": {"top_k": 4}}', "[1]"):
        assert Label.parse(label).sampling == (None, None)


def test_prompts_are_measured_as_the_host_makes_them(tmp_path: Path) -> None:
    skd = config(tmp_path, tasks=several("arithmetic"))
    assert len(draw_prompts(skd, AS_IT_IS, Words(), 35, None)["train"]) == 60
    with pytest.raises(RecipeError, match=r"prompt 1 has \d+ tokens"):
        draw_prompts(skd, PromptForm("input", chat=Words().apply_chat_template), Words(), 35, None)


# --- bad input ---


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tasks": several("arithmetics")}, r"unknown key 'arithmetics'; did you mean 'arithmetic'"),
        ({"tasks": several("arithmetic", "arithmetic")}, r"skd\.tasks: arithmetic is there twice"),
        ({"task": several("arithmetic")[0], "tasks": several("summary")}, r"skd\.task and skd\.tasks are both given"),
        ({"tasks": several("arithmetic", weight=2)}, r"weight of task arithmetic has no effect: it is the only task"),
        ({"tasks": [*several("summary"), *several("gsm8k", train_prompts=0, weight=1)]}, "its train_prompts is 0"),
        ({"task": several("arithmetic")[0], "mix_temperature": 2}, "mix_temperature = 2.0 has no effect"),
        ({"tasks": several("arithmetic", weight=0)}, r"skd\.tasks\.0\.weight: input should be greater than 0; got 0"),
        ({"tasks": several("arithmetic", train_prompts=-1)}, r"skd\.tasks\.0\.train_prompts: .*; got -1"),
        ({"tasks": several("arithmetic", train_prompts="all")}, r"skd\.tasks\.0\.train_prompts: .*; got 'all'"),
        ({"tasks": several("arithmetic", top_k=2)}, r"arithmetic is the only one: set skd\.rollout\.top_k in place"),
        ({"task": several("arithmetic", max_new_tokens=2)[0]}, r"only one: set skd\.rollout\.max_new_tokens"),
        (
            {"tasks": several("arithmetic", "summary", top_k=2), "rollout": {"method": "on_policy"}},
            "top_k of task arithmetic has no effect: .* the method is on_policy",
        ),
        (
            {"tasks": several("arithmetic", "summary", top_k=2), "rollout": {"gate": "floor", "threshold": 0.1}},
            "the gate floor",
        ),
        ({"tasks": several("arithmetic", "summary", top_k=0)}, r"skd\.tasks\.0\.top_k: .*; got 0"),
        ({"tasks": several("arithmetic", wieght=1)}, r"unknown key 'skd\.tasks\.0\.wieght'"),
        ({"tasks": several("arithmetic", train_prompts="full")}, "skd.task: task arithmetic has no end of prompts"),
        ({"tasks": several("arithmetic", train_prompts=0)}, "every train_prompts is 0"),
        ({"tasks": several("arithmetic", path="x")}, r"skd\.task\.path is for tasks that read a dataset"),
        ({"tasks": several("gsm8k", path="nowhere")}, r"skd\.task: skd\.task\.path: nowhere has no train\.json"),
        ({"tasks": several("./nothing.py")}, r"skd\.task\.name: there is no task file .*nothing\.py"),
    ],
)
def test_what_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        drawn(tmp_path, **sections)


def test_a_scorer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS["translation"], "packages", ("no_such_scorer",))
    with pytest.raises(RecipeError, match=r"scored by no_such_scorer, which is not installed; .*\[tasks\]"):
        drawn(tmp_path, tasks=several("translation"))


def test_file_without_a_task(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("TASK = int\n")
    with pytest.raises(TaskError, match="TASK must be a class with name, metric, max_new_tokens, examples, score"):
        find_task(str(tmp_path / "empty.py"))


# --- a whole recipe ---


@pytest.fixture
def recipe(tmp_path: Path):
    """The quickstart with tasks in place of its task; a task of one's own, named relative to the recipe."""
    (tmp_path / "echo.py").write_text(OWN_TASK)
    path = tmp_path / "mixed.yaml"
    path.write_text(
        f"base: {QUICKSTART}\n"
        "skd:\n  task: null\n  rollout: {max_new_tokens: null}\n"
        "  tasks:\n    - {name: arithmetic, train_prompts: 6, eval_prompts: 3, weight: 2}\n"
        "    - {name: ./echo.py, train_prompts: 6, eval_prompts: 2, weight: 1}\n"
    )
    return path


def test_recipe_of_two_tasks(recipe: Path, tmp_path: Path) -> None:
    run = load_run(recipe, [*SMALL, f"skd.run_dir={tmp_path / 'run'}"])
    assert run.host["rollout.max_new_tokens"] == 96
    assert by_task(run.data["train"]) == {"arithmetic": 8, "echo": 4}
    assert by_task(run.data["test"]) == {"arithmetic": 3, "echo": 2}
    label = next(row["label"] for row in run.data["test"] if row["datasource"] == "echo")
    assert Label.parse(label).checker().name == "echo" and score_response(" 0", label) == 1.0
    run.save()
    assert Run.load(run.folder) == run and len(Run.load(run.folder).skd.tasks) == 2


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("None, ' 1', '1'", "its prompt is None, but must be a text"),
        ("'tom has 3 .', ' 1', 1", "its label is 1, but must be a text"),
        ("'tom has 3 .', 5, '1'", "its reference is 5, but must be a text"),
        ("'tom has \\ud800', ' 1', '1'", None),
    ],
)
def test_examples_that_are_no_texts(recipe: Path, tmp_path: Path, example: str, message: str | None) -> None:
    own = OWN_TASK.replace('f"tom has {split == \'test\'} {n} coins .", " 1", str(n)', example)
    assert own != OWN_TASK
    (tmp_path / "echo.py").write_text(own)
    words = f"example 1 of echo's train split: {message}" if message else "has .*ud800 in it, half of a character"
    with pytest.raises(RecipeError, match=words):
        load_run(recipe, [*SMALL, f"skd.run_dir={tmp_path / 'run'}"])


def test_dry_run_of_several_tasks_is_one_step(recipe: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, f"skd.run_dir={tmp_path / 'run'}"]
    short = one_step(str(recipe), overrides, load_run(recipe, overrides), tmp_path / "dry")
    assert [task.train_prompts for task in short.skd.tasks] == [2, 2]
    assert len(short.data["train"]) == 4 and short.host["data.max_samples"] == 2


def test_limit_of_the_recipe_wins(recipe: Path) -> None:
    assert load_models(recipe).max_new_tokens == 96
    assert load_models(recipe, ["openrlhf.rollout.max_new_tokens=50"]).max_new_tokens == 50
    assert load_models(recipe, ["skd.rollout.max_new_tokens=40"]).max_new_tokens == 40


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """docs/tasks.md, word for word: the file, the recipe's section, the score."""
    text = (QUICKSTART.parents[1] / "docs" / "tasks.md").read_text().split("## A task of your own")[1]
    code, section = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "yaml"))
    (tmp_path / "capitals.py").write_text(code)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {QUICKSTART}\n{section}  rollout: {{max_new_tokens: null}}\n")
    run = load_run(recipe, [*SMALL, f"skd.run_dir={tmp_path / 'run'}"])
    assert run.host["rollout.max_new_tokens"] == 8
    assert len(run.data["train"]) == 4
    (row,) = run.data["test"]
    assert row["input"] == "the capital of peru is" and row["datasource"] == "capitals"
    for answer, score in (("lima", 1.0), ("paris", 0.0)):
        assert score_response(f" {answer}", row["label"]) == score
    assert Label.parse(row["label"]).checker().metrics(["it is lima"], ["lima"]) == {"mentioned": 1.0}
    with pytest.raises(RecipeError, match="capitals has 4 train prompts, but 5 are asked for"):
        load_run(recipe, [*SMALL, f"skd.run_dir={tmp_path / 'run'}", "skd.task.train_prompts=5"])


def test_the_recipe_of_four_tasks(tmp_path: Path) -> None:
    """Every prompt fits, each task has its share, its limit and its K."""
    run = load_run(QUICKSTART.with_name("four-tasks.yaml"), [f"skd.run_dir={tmp_path}"])
    assert run.host["rollout.max_new_tokens"] == 96
    assert by_task(run.data["train"]) == dict.fromkeys(("arithmetic", "translation", "summary", "instructions"), 1600)
    own = {row["datasource"]: Label.parse(row["label"]).sampling for row in run.data["train"]}
    assert own == {
        "arithmetic": Sampling(),
        "translation": Sampling(top_k=5, max_new_tokens=64),
        "summary": Sampling(max_new_tokens=80),
        "instructions": Sampling(max_new_tokens=64),
    }
