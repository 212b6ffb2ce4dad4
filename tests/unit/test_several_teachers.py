"""Several teachers of one run: which engines have them, which prompts they get, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skd_plugin.check.findings import Finding
from skd_plugin.check.subject import read_subject
from skd_plugin.config.recipe import load_recipe
from skd_plugin.config.schema import SKDConfig, parse_skd
from skd_plugin.config.teacher import ONLY, teacher_words
from skd_plugin.core.chunked import against_teacher, against_teachers
from skd_plugin.core.metrics import figures_of
from skd_plugin.core.trace import Trace
from skd_plugin.errors import RecipeError
from skd_plugin.evaluate.command import job_of
from skd_plugin.evaluate.plan import make_plan
from skd_plugin.host.teacher_prompts import PairedPrompt, teacher_of, teacher_prompt
from skd_plugin.host.trace_store import TRACE_KEY
from skd_plugin.prepare.load_run import load_models, load_run
from skd_plugin.prepare.teachers import share_out
from skd_plugin.rollout_command import run_rollout
from tests.recipes import PAIR, RECIPES
from tests.traces import trace_of
from tests.unit.test_datasets import in_the_controller
from tests.unit.test_metrics import KEPT, SWAPPED, make_trace

TEACHERS = {"math": {"model_name_or_path": str(PAIR / "teacher")}, "words": {"model_name_or_path": str(PAIR / "cold")}}
TASKS = [
    {"name": "arithmetic", "train_prompts": 6, "eval_prompts": 2, "teacher": "math"},
    {"name": "instructions", "train_prompts": 2, "eval_prompts": 1, "teacher": "words"},
]
ROWS = [{"input": f"tom has {n} coins .", "by": "words" if n == 3 else "math", "so": f"{n} ."} for n in range(1, 5)]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe(engines=2, rows=None, host=None, **skd)`: two tasks, or a dataset of these rows."""

    def write(engines: int = 2, rows: Any = None, **skd: Any) -> Path:
        host: dict[str, Any] = {
            "actor": {"model_name_or_path": str(PAIR / "student")},
            "data": {"max_len": 160},
            "rollout": {"batch_size": 2},
            "train": {"batch_size": 2},
            "vllm": {"num_engines": engines},
        }
        own: dict[str, Any] = {"rollout": {"max_new_tokens": 64, "top_k": 3}, "loss": {"teacher_top_k": 8}}
        own |= {"run_dir": str(tmp_path / "run"), "teachers": TEACHERS}
        if rows is None:
            own["tasks"] = TASKS
        else:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            host["data"]["prompt_dataset"] = str(tmp_path / "rows.jsonl")
            host["eval"] = {"dataset": str(tmp_path / "rows.jsonl")}
            own["teacher_column"] = "by"
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"openrlhf": host, "skd": {**own, **skd}}))
        return path

    return write


def engines_of(skd: SKDConfig) -> dict[str, int | None]:
    return {name: teacher.engines for name, teacher in skd.teachers.items()}


# --- engines ---


@pytest.mark.parametrize(
    ("engines", "given", "prompts", "found"),
    [
        (2, (None, None), (90, 10), (1, 1)),
        (4, (None, None), (90, 10), (3, 1)),
        (4, (None, None), (10, 10), (2, 2)),
        (5, (None, None), (60, 40), (3, 2)),
        (4, (None, 2), (90, 10), (2, 2)),
        (4, (1, 3), (90, 10), (1, 3)),
        (3, (None, None), (0, 10), (1, 2)),
    ],
)
def test_engines_go_where_the_prompts_are(engines, given, prompts, found) -> None:
    named = zip(TEACHERS, given, strict=True)
    skd = parse_skd({"teachers": {n: TEACHERS[n] | {"engines": e} for n, e in named}, "teacher_column": "by"})
    shared = share_out(skd, dict(zip(TEACHERS, prompts, strict=True)), engines)
    assert tuple(engines_of(shared).values()) == found
    assert Counter(shared.teachers_of_engines(engines)) == dict(zip(TEACHERS, found, strict=True))


@pytest.mark.parametrize(("engines", "given"), [(2, (2, None)), (4, (1, 2)), (2, (2, 2))])
def test_engines_that_do_not_come_out_even(engines, given) -> None:
    named = zip(TEACHERS, given, strict=True)
    skd = parse_skd({"teachers": {n: TEACHERS[n] | {"engines": e} for n, e in named}, "teacher_column": "by"})
    with pytest.raises(RecipeError, match=rf"the engines of skd\.teachers \(math .*num_engines is {engines};"):
        share_out(skd, {}, engines)


def test_one_teacher_is_in_every_engine() -> None:
    skd = parse_skd({"teacher": TEACHERS["math"]})
    assert skd.teachers_of_engines(3) == [ONLY] * 3 and list(skd.all_teachers) == [ONLY]
    assert skd.of_teacher(ONLY) is skd and teacher_words(ONLY) == "teacher" and teacher_words("a") == "teacher 'a'"


# --- refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": TEACHERS["math"]}, r"^skd: skd\.teacher and skd\.teachers are both given"),
        ({"teachers": {}, "teacher": TEACHERS["math"]}, r"task arithmetic names a teacher, but there is one"),
        ({"teachers": {}, "teacher": {**TEACHERS["math"], "engines": 2}}, r"engines = 2 has no effect: the only"),
        ({"teachers": {}, "teacher": TEACHERS["math"], "teacher_column": "by"}, r"teacher_column = by has no effect"),
        ({"teacher_column": "by"}, r"teacher_column = by has no effect: the tasks name"),
        ({"tasks": [TASKS[0], {**TASKS[1], "teacher": None}]}, r"task instructions names no teacher; teacher is one"),
        ({"tasks": [TASKS[0], {**TASKS[1], "teacher": "m"}]}, r"task instructions has a teacher 'm'; teacher is one"),
        ({"tasks": TASKS[:1]}, r"no task has teacher 'words'"),
        ({"tasks": []}, r"teacher_column must name the dataset's column"),
        (
            {"teachers": {**TEACHERS, "math": {**TEACHERS["math"], "follow": {"ema": 0.9}}}},
            r"teachers\.math\.follow: of several teachers none can move",
        ),
        ({"teachers": {"a.b": TEACHERS["math"]}}, r"skd\.teachers\.a\.b.*should match pattern"),
    ],
)
def test_what_makes_no_recipe(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_skd({"teachers": TEACHERS, "tasks": TASKS} | change)


def test_fewer_engines_than_teachers(recipe) -> None:
    with pytest.raises(RecipeError, match=r"2 teachers \(skd\.teachers: math, words\), but .*num_engines is 1: .*Set"):
        load_run(recipe(engines=1))


def test_a_teacher_of_other_tokens_is_named(recipe) -> None:
    other = {"model_name_or_path": str(PAIR.parent / "translation" / "teacher")}
    with pytest.raises(RecipeError, match=r"^skd\.teachers\.words: teacher and student have different vocabularies"):
        load_run(recipe(teachers=TEACHERS | {"words": other}))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"vocab_size": 191}, r"in common \(math 192, words 191\)"),
        ("generation_config.json", {"eos_token_id": [2, 7]}, r"math \(\), words \(2, 7\)\); .*skd\.end_tokens=apart"),
    ],
)
def test_teachers_that_are_not_alike(recipe, tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    """In padding, or in the tokens that end a turn."""
    for own in (PAIR / "cold").iterdir():
        (tmp_path / own.name).write_bytes(own.read_bytes())
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises(RecipeError, match=rf"^skd\.teachers: .*{message}"):
        load_run(recipe(teachers=TEACHERS | {"words": {"model_name_or_path": str(tmp_path)}}))


# --- prompts ---


def test_a_task_names_its_teacher(recipe) -> None:
    run = load_run(recipe(engines=4))
    assert engines_of(run.skd) == {"math": 3, "words": 1}
    by_task = {"arithmetic": "math", "instructions": "words"}
    assert all(row["teacher"] == by_task[row["datasource"]] for rows in run.data.values() for row in rows)
    for prompt, row in zip(run.prompts, run.data["train"], strict=True):
        assert (teacher_of(prompt), teacher_prompt(prompt)) == (row["teacher"], None)
    run.save()
    assert type(run).load(run.folder).skd == run.skd


def test_a_row_names_its_teacher(recipe) -> None:
    path = recipe(rows=ROWS)
    assert engines_of(load_run(path).skd) == {"math": 1, "words": 1}
    found = in_the_controller(path)
    assert [(str(prompt), teacher_of(prompt)) for prompt in found.prompts] == [(r["input"], r["by"]) for r in ROWS]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {**ROWS[0], "by": "maths"}], r"line 5: 'by' is maths, but must name a teacher: math or words \(skd"),
        ([*ROWS, {**ROWS[0], "by": None}], r"line 5: 'by' is missing or null, but must name a teacher"),
        ([{"input": row["input"]} for row in ROWS], r"has no column 'by' \(skd\.teacher_column\); it has input"),
        ([{**row, "by": "math"} for row in ROWS], r"skd\.teachers\.words: no row of .* names it in 'by'"),
    ],
)
def test_rows_that_name_none(recipe, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_run(recipe(rows=rows))


def test_each_teacher_has_prompts_of_its_own(recipe) -> None:
    """One reads more than the student, by a column that rows of the other need not have."""
    rows = [{**row, "so": row["so"] if row["by"] == "math" else None} for row in ROWS]
    math = {**TEACHERS["math"], "prompt": {"template": "{so} {input}"}}
    path = recipe(rows=rows, teachers={**TEACHERS, "math": math})
    own = [f"{row['so']} {row['input']}" if row["by"] == "math" else None for row in rows]
    assert [teacher_prompt(prompt) for prompt in load_run(path).prompts] == own
    plan = make_plan(str(path), [], [], ["distance"])
    assert [prompt.teacher for prompt in plan.held_out[0]] == ["math"] * 3 + ["words"]
    assert [prompt.prompt.teacher_ids is not None for prompt in plan.held_out[0]] == [True] * 3 + [False]
    too_long = {**TEACHERS["words"], "prompt": {"template": "{input} " * 30}}
    with pytest.raises(RecipeError, match=r"line 3: the teacher's prompt has \d+ tokens, but 96 fit"):
        load_run(recipe(rows=rows, teachers={"math": math, "words": too_long}))


def test_prompts_of_tasks_for_one_of_two(recipe) -> None:
    tasks = [{**TASKS[0], "teacher_prompt": {"template": "{answer} . {input}"}}, TASKS[1]]
    for row in load_run(recipe(tasks=tasks)).data["train"]:
        own = row.get("teacher_prompt")
        assert (own is None) == (row["teacher"] == "words") and (own is None or own.endswith(row["input"]))


def test_other_names_and_another_order_are_another_run(recipe) -> None:
    first = load_run(recipe()).flat_options()
    assert first["skd.teachers"] == ["math", "words"]
    turned = load_run(recipe(teachers=dict(reversed(TEACHERS.items())))).flat_options()
    assert {key for key in first if first[key] != turned[key]} == {"skd.teachers"}


# --- the other commands ---


def test_a_rollout_is_told_whose_it_is(recipe, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [4, 5]}\n')

    def roll_out(name: str | None, **skd: Any) -> None:
        out = str(tmp_path / "out.jsonl")
        run_rollout(str(recipe(**skd)), [], str(prompts), 1, out, raw=False, teacher=name)

    with pytest.raises(RecipeError, match=r"^--teacher is missing: its teachers are math, words"):
        roll_out(None)
    with pytest.raises(RecipeError, match=r"^--teacher maths is none of the recipe's: its teachers are math, words"):
        roll_out("maths")
    alone = {"teachers": {}, "teacher": TEACHERS["math"], "tasks": []}
    with pytest.raises(RecipeError, match=r"it has one teacher, which needs no name"):
        roll_out("math", **alone)
    models = load_models(recipe()).of_teacher("words")
    assert models.skd.the_teacher.model_name_or_path == TEACHERS["words"]["model_name_or_path"]
    assert [task.name for task in models.skd.all_tasks] == ["instructions"]


def test_evaluations_ask_each_teacher_for_its_prompts(recipe) -> None:
    plan = make_plan(str(recipe()), [], [], ["scores", "distance"])
    models = {name: teacher["model_name_or_path"] for name, teacher in TEACHERS.items()}
    assert plan.teachers == plan.teacher == models
    assert [(prompt.task, prompt.teacher) for prompt in plan.held_out[0]] == [
        *[("arithmetic", "math")] * 2,
        ("instructions", "words"),
    ]
    for name in models:
        own = [prompt for prompt in plan.held_out[0] if prompt.teacher == name]
        assert job_of(plan, plan.students[0], own, name).spec.teacher == models[name]
    assert make_plan(str(recipe()), [], [], ["scores"]).teacher is None


def test_checks_look_at_each_pair(recipe) -> None:
    subject = read_subject(str(recipe()), [])
    assert subject.error is None and list(subject.teachers) == ["math", "words"]
    for name in subject.teachers:
        part = subject.of_teacher(name)
        assert part.teachers == {ONLY: TEACHERS[name]["model_name_or_path"]}
        assert part.run is not None and {teacher_of(prompt) for prompt in part.run.prompts} == {name}
    assert Finding("memory", "").of_teacher("math").name == "memory (math)"
    assert Finding("memory", "").of_teacher(ONLY).name == "memory"


def test_the_recipe_with_two_teachers() -> None:
    """Its teachers are made by a command of recipes/README.md."""
    skd = parse_skd(load_recipe(RECIPES / "two-teachers.yaml")["skd"])
    assert {task.name: task.teacher for task in skd.all_tasks} == {"arithmetic": "sums", "translation": "words"}
    readme = (RECIPES / "README.md").read_text()
    for name, task in (("sums", "arithmetic"), ("words", "translation")):
        folder = Path(skd.teachers[name].model_name_or_path)
        assert folder == RECIPES.parent / ".cache" / "single-task" / task / "teacher"
    assert ".cache/single-task/$task --only teacher" in readme


# --- traces and losses ---


def test_hidden_states_of_two_widths_are_one_tensor() -> None:
    narrow = trace_of(torch.tensor([4, 5]), teacher_hidden=torch.ones(2, 3))
    wide = trace_of(torch.tensor([6]), teacher_hidden=torch.ones(1, 5), teacher=torch.tensor([1], dtype=torch.uint8))
    joined = Trace.join([narrow, wide])
    assert joined.teacher.tolist() == [0, 0, 1]
    assert joined.teacher_hidden.tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert joined.slice(2, 3).teacher.tolist() == [1]


def test_each_token_has_the_loss_of_its_own_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(7, width, generator=generator) for width in (3, 5)]
    hidden = torch.randn(4, 5, generator=generator)
    log_q = torch.randn(4, 7, generator=generator).log_softmax(-1)
    teacher = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)

    def loss(rows: slice, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    found = against_teachers(hidden, heads, teacher, loss)(slice(0, 4), log_q)
    alone = [against_teacher(hidden[:, : len(h.T)], h, loss)(slice(0, 4), log_q) for h in heads]
    torch.testing.assert_close(found, torch.where(teacher.bool(), alone[1], alone[0]))
    part = against_teachers(hidden, heads, teacher, loss)(slice(2, 3), log_q[2:3])
    torch.testing.assert_close(part, alone[0][2:3])


def test_figures_of_each_teacher() -> None:
    """Beside those of each task; a teacher without a response in the step has none."""
    from skd_plugin.host import on_cpu

    on_cpu.install()
    from skd_plugin.host.run_samples import RunSamples

    def sample(name: str, source: str, trace: Trace) -> SimpleNamespace:
        stored = SimpleNamespace(figures=figures_of(trace, 2))
        return SimpleNamespace(prompts=[PairedPrompt(source, None, name)], info={TRACE_KEY: [stored]}, truncated=False)

    generator: Any = object.__new__(RunSamples)
    generator.args = SimpleNamespace(skd=parse_skd({"teachers": TEACHERS, "teacher_column": "by"}))
    generator._several_tasks, generator._sources = True, {"a": "x", "b": "y"}
    traces = [make_trace([KEPT, SWAPPED], kl=1.0), make_trace([KEPT], kl=4.0)]
    metrics = generator._metrics([sample("math", "a", traces[0]), sample("math", "b", traces[1])])
    assert metrics["skd/kl/teacher_math"] == metrics["skd/kl"] == 2.0
    assert (metrics["skd/kl/x"], metrics["skd/kl/y"]) == (1.0, 4.0)
    assert metrics["skd/accept_rate/teacher_math"] == pytest.approx(2 / 3)
    assert not any("teacher_words" in name for name in metrics)


def test_every_teacher_is_compared_where_it_first_has_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    from skd_plugin.host import on_cpu

    on_cpu.install()
    from skd_plugin.host import training_side

    asked: list[tuple[str, int]] = []

    def compare(samples: list[Any], engine: dict[str, Any], read: Any, *, quantised: bool) -> float:
        asked.append((engine["teacher"], len(samples)))
        return 0.5

    monkeypatch.setattr(training_side, "compare_teachers", compare)
    side: Any = training_side.TrainingSide()
    side.skd = parse_skd({"teachers": TEACHERS, "tasks": TASKS})
    models = {name: teacher["model_name_or_path"] for name, teacher in TEACHERS.items()}
    side._engines = {name: {"teacher": model, "quantization": None} for name, model in models.items()}
    side._uncompared = ["math", "words"]

    def step(*names: str) -> dict[str, float]:
        samples = [SimpleNamespace(prompts=[PairedPrompt("a", None, name)]) for name in names]
        return side._compare_teachers(samples, 0)

    assert step("math", "math") == {"skd/teacher_gap/teacher_math": 0.5}
    assert step("math") == {}
    assert step("math", "words") == {"skd/teacher_gap/teacher_words": 0.5} and step("words") == {}
    assert asked == [(models["math"], 2), (models["words"], 1)]
