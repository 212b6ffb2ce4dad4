"""`skd eval` without an engine: what is refused at once, and from answers to metrics, file and table."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from skd_plugin import cli
from skd_plugin.errors import RecipeError
from skd_plugin.evaluate.command import job_of
from skd_plugin.evaluate.job import Answers, Job, Response, read_answers, write_answers
from skd_plugin.evaluate.plan import make_plan, student_of
from skd_plugin.evaluate.result import summarise
from skd_plugin.evaluate.result_table import tables
from skd_plugin.evaluate.values import task_values
from skd_plugin.tasks import Translation
from skd_plugin.tasks.arithmetic import Arithmetic
from skd_plugin.tasks.label import Label

RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = str(RECIPES / "quickstart.yaml")
TEACHER, STUDENT = (str(RECIPES / "models" / "arithmetic" / name) for name in ("teacher", "student"))
FEW = ["skd.task.eval_prompts=3"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder whose model is the untrained student; the files are links."""
    folder = tmp_path / "run"
    (folder / "data").mkdir(parents=True)
    host = {"actor.model_name_or_path": STUDENT, "data.max_len": 176, "eval.dataset": str(folder / "data/test.jsonl")}
    skd = {
        "teacher": {"model_name_or_path": TEACHER},
        "rollout": {"top_k": 3, "draft_len": 2},
        "task": {"name": "arithmetic", "eval_prompts": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"openrlhf": host, "skd": skd, "cpu": True}))
    (folder / "model").symlink_to(STUDENT)
    return folder


# --- what is measured of whom ---


def test_a_recipe_measures_its_student_by_everything():
    plan = make_plan(QUICKSTART, FEW, [], ["all"])
    assert [s.model for s in plan.students] == [STUDENT] and plan.teacher == TEACHER and not plan.notes
    assert plan.measures == ("scores", "distance", "prefixes", "speculation")
    assert plan.sampling.samples == 16 and plan.sampling.k == (1, 4, 16)
    (held_out,) = plan.held_out
    assert [(one.prompt.limit, one.task) for one in held_out] == [(96, "arithmetic")] * 3
    examples = Arithmetic().examples("test", 3)
    assert [one.prompt.reference for one in held_out] == [example.reference for example in examples]
    assert [one.label.answer for one in held_out] == [example.label for example in examples]


def test_a_run_measures_its_student_before_and_after(run_folder: Path):
    plan = make_plan(str(run_folder), ["skd.task.eval_prompts=2", "openrlhf.data.max_len=150"], [], ["all"])
    assert [(s.name, s.model) for s in plan.students] == [
        (STUDENT, STUDENT),
        (str(run_folder), str(run_folder / "model")),
    ]
    assert len(plan.held_out[0]) == 2 and plan.models.max_len == 150


def test_a_run_is_a_student_of_a_recipe(run_folder: Path):
    plan = make_plan(QUICKSTART, FEW, [TEACHER, str(run_folder)], ["speculation", "scores"], samples=8)
    assert [s.model for s in plan.students] == [TEACHER, str(run_folder / "model")]
    assert plan.measures == ("scores", "speculation") and plan.sampling.k == (1, 4)


def test_an_adapter_is_a_student(tmp_path: Path):
    """With and without a teacher; its folder describes the model, and its weights may be OpenRLHF's pickle."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(Path(STUDENT) / name)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": STUDENT}))
    (folder / "adapter_model.bin").touch()
    for measures in (["scores"], ["all"]):
        plan = make_plan(QUICKSTART, FEW, [str(folder)], measures)
        assert [student.model for student in plan.students] == [str(folder)]
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(RecipeError, match=r"is a LoRA adapter without tokenizer_config\.json; merge it with"):
        make_plan(QUICKSTART, FEW, [str(folder)], ["all"])


def test_without_a_teacher_the_scores_are_measured(tmp_path: Path):
    recipe = tmp_path / "scores.yaml"
    recipe.write_text("openrlhf: {data: {max_len: 176}}\nskd: {task: {name: arithmetic, eval_prompts: 2}}\n")
    plan = make_plan(str(recipe), [], [STUDENT], ["all"])
    assert plan.measures == ("scores",) and plan.teacher is None
    assert [note.split(":")[0] for note in plan.notes] == ["distance", "prefixes", "speculation"]
    with pytest.raises(RecipeError, match=r"--measure distance: the recipe names no skd\.teacher"):
        make_plan(str(recipe), [], [STUDENT], ["scores", "distance"])
    with pytest.raises(RecipeError, match="model_name_or_path is missing"):
        make_plan(str(recipe), [], [], ["all"])


def test_prompts_of_ones_own_have_no_scores(tmp_path: Path):
    prompts = tmp_path / "test.jsonl"
    prompts.write_text('{"input": "tom has 4 coins .", "label": " the answer is 4"}\n{"input": "ann has 2 pens ."}\n')
    given = ["skd.task=null", f"openrlhf.eval.dataset={prompts}", "openrlhf.data.input_key=input",
             "openrlhf.data.label_key=label"]  # fmt: skip
    plan = make_plan(QUICKSTART, given, [], ["all"])
    assert plan.measures == ("scores", "distance", "speculation")
    assert plan.notes[0].startswith("prefixes: the recipe has no skd.task")
    assert plan.notes[1].startswith("distance along references: not every")
    assert [one.label.checker() for one in plan.held_out[0]] == [None, None]
    assert [one.prompt.reference for one in plan.held_out[0]] == [" the answer is 4", None]
    with pytest.raises(RecipeError, match=r"--measure prefixes: the recipe has no skd\.task"):
        make_plan(QUICKSTART, given, [], ["prefixes"])


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"samples": 4, "k": [1, 8]}, r"--k 8 is not within 1\.\.4: pass@k needs at least k samples"),
        ([], {"k": [0]}, "--k 0 is not within"),
        ([], {"samples": 0}, "--samples is 0"),
        ([], {"temperature": 0.0}, "--temperature is 0"),
        ([], {"measures": ["score"]}, "--measure score: there are all, scores"),
        ([], {"students": [STUDENT, STUDENT]}, "names one model twice"),
        ([], {"students": ["./nowhere"]}, "'./nowhere' is not there"),
        (["skd.task.eval_prompts=0"], {}, "no held-out prompts: set skd.task.eval_prompts"),
        (["skd.task=null"], {}, "no held-out prompts: give the recipe a skd.task"),
        (["skd.task=null", "openrlhf.eval.dataset=some/hub"], {}, "some/hub cannot be read: .*on the Hub"),
        (["openrlhf.data.max_len=100"], {}, "but 2 to 4 fit"),
        (["openrlhf.train.agent_func_path=a.py"], {}, "names an agent"),
        (["skd.rollout.topk=3"], {}, r"unknown key 'skd\.rollout\.topk'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_once(overrides, options, message):
    arguments = {"students": [], "measures": ["all"], **options}
    with pytest.raises(RecipeError, match=message):
        make_plan(QUICKSTART, [*FEW, *overrides], **arguments)


def test_folders_that_are_no_students(tmp_path: Path, run_folder: Path):
    with pytest.raises(RecipeError, match=r"without config\.yaml, so it is no run"):
        make_plan(str(tmp_path), [], [], ["all"])
    (run_folder / "model").unlink()
    with pytest.raises(RecipeError, match=r"the run .* has no model/: it has not come to its end"):
        student_of(str(run_folder))


def test_the_command_line(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        "skd_plugin.evaluate.command.run_eval", lambda plan, where, out: seen.update(plan=plan, out=out) or 0
    )
    arguments = ["eval", QUICKSTART, "--student", STUDENT, TEACHER, *FEW, "--k", "2", "1", "--out", "x.json"]
    assert cli.main(arguments) == 0
    assert len(seen["plan"].students) == 2 and len(seen["plan"].held_out[0]) == 3
    assert seen["plan"].sampling.k == (1, 2) and seen["out"] == "x.json"
    assert cli.main(["eval", QUICKSTART, "--samples", "2", "--k", "4"]) == 2
    assert "skd eval: --k 4 is not within 1..2" in capsys.readouterr().err


# --- from answers to metrics ---


def answer(text: str, *, ended: bool = True) -> Response:
    ids = [len(word) for word in text.split()]
    return {"length": len(ids) + ended, "ids": ids, "text": text, "ended": ended}


@pytest.fixture
def plan():
    return make_plan(QUICKSTART, ["skd.task.eval_prompts=2"], [STUDENT, TEACHER], ["all"], samples=2, k=[1, 2])


@pytest.fixture
def found(plan) -> list[list[Answers]]:
    """Answers of two students to two prompts; the second one answers both of them."""
    right = [f"the answer is {example.label}" for example in Arithmetic().examples("test", 2)]
    wrong = ["the answer is 0"] * 2
    kept = [[True, True, False], [False, True]]

    def of(first: list[str], second: list[str]) -> list[Answers]:
        sums = {"tokens": 2, "kl": 1.0, "student_entropy": 0.5, "teacher_entropy": 0.25}
        cuts = [
            {"0.25": right[place], "0.5": right[place], "0.75": wrong[place], "1": first[place]} for place in (0, 1)
        ]
        return [
            {
                "greedy": answer(first[place]),
                "sampled": [answer(first[place]), answer(second[place], ended=False)],
                "distance": {"sampled": sums, "references": sums},
                "prefixes": {"alone": right[place], "student": cut, "skd": cut, "teacher": cut},
                "speculation": {"sampled": kept[place]},
            }
            for place, cut in enumerate(cuts)
        ]

    return [of([right[0], wrong[1]], wrong), of(right, wrong)]


def test_metrics_of_answers(plan, found):
    result = asdict(summarise(plan, "r.yaml", found))
    first, second = (student["tasks"]["arithmetic"] for student in result["students"])
    means = {name: estimate["mean"] for name, estimate in first.items()}
    assert all(estimate["n"] == 2 for estimate in first.values())
    assert means["scores/greedy/accuracy"] == 0.5 and means["scores/greedy/step_validity"] == 0.0
    assert means["scores/sampled/accuracy"] == means["scores/sampled/pass@1"] == 0.25
    assert means["scores/sampled/pass@2"] == 0.5
    assert means["scores/greedy/ended"] == 1.0 and means["scores/sampled/ended"] == 0.5
    assert means["scores/greedy/response_len"] == 5.0 and means["scores/sampled/response_len"] == 4.5
    assert means["distance/references/kl"] == 0.5 and means["distance/sampled/teacher_entropy"] == 0.125
    assert "distance/greedy/kl" not in means
    assert means["prefixes/teacher_alone"] == means["prefixes/skd/0.5"] == 1.0
    assert means["prefixes/student/0.75"] == 0.0 and means["prefixes/student/1"] == 0.5
    assert means["speculation/sampled/acceptance_rate"] == 3 / 5
    assert means["speculation/sampled/tokens_per_forward@2"] == 5 / 3  # sst, t, s
    assert means["speculation/sampled/accepted_per_block@2"] == 3 / 3
    assert means["speculation/sampled/tokens_per_forward@1"] == 5 / 4
    assert first["scores/greedy/distinct_1"]["low"] is None
    assert second["scores/greedy/accuracy"] == {"n": 2, "mean": 1.0, "low": 1.0, "high": 1.0}
    (difference,) = result["differences"]
    assert (difference["student"], difference["minus"]) == (TEACHER, STUDENT)
    assert difference["tasks"]["arithmetic"]["scores/greedy/accuracy"] == {
        "n": 2,
        "mean": 0.5,
        "low": 0.0,
        "high": 1.0,
    }


def test_a_graded_task_has_the_best_of_k(plan, found):
    answers: list[Answers] = [{"greedy": one["greedy"], "sampled": one["sampled"]} for one in found[0]]
    label = Label("x", "translation", Translation().examples("test", 1)[0].label, "</s>")
    values = task_values(answers, [label] * 2, k=[1, 2], draft_len=2)
    assert {"scores/greedy/chrf", "scores/sampled/chrf", "scores/sampled/best_of@2"} <= values.keys()
    assert "scores/sampled/pass@2" not in values


def test_each_task_has_its_own_metrics(plan, found):
    own = tuple((one, replace(other, task="other")) for one, other in plan.held_out)
    result = asdict(summarise(replace(plan, held_out=own), "r.yaml", found))
    tasks = result["students"][0]["tasks"]
    assert list(tasks) == ["arithmetic", "other"]
    assert tasks["arithmetic"]["scores/greedy/accuracy"] == {"n": 1, "mean": 1.0, "low": 1.0, "high": 1.0}
    assert tasks["other"]["scores/greedy/accuracy"]["mean"] == 0.0


def test_the_file_is_strict_json_and_the_table_shows_it(plan, found):
    result = summarise(plan, "r.yaml", found)
    content = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert list(content) == ["recipe", "teacher", "settings", "students", "differences"]
    assert list(content["students"][0]) == ["name", "model", "tasks"]
    assert list(content["settings"]) == ["samples", "k", "temperature", "measures", "draft_len", "max_new_tokens",
                                         "seed", "level", "resamples"]  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    for table in tables(result):
        console.print(table)
    shown = console.file.getvalue()
    assert "greedy accuracy, %" in shown
    assert "50.0 [0.0, 100.0]" in shown and "+50.0 [+0.0, +100.0]" in shown
    assert "tokens_per_forward@4" in shown and "tokens_per_forward@8" not in shown
    assert "arithmetic/student" in shown and "difference" in shown


def test_names_in_a_table_are_no_markup(plan, found):
    """Of tasks, students and metrics."""
    hostile = "[bold] [a, b]"
    result = summarise(plan, "r.yaml", found)
    estimate = result.students[0].tasks["arithmetic"]["scores/greedy/accuracy"]
    student = replace(result.students[0], name=hostile, tasks={hostile: {f"{hostile}/{hostile}": estimate}})
    console = Console(file=io.StringIO(), width=200)
    for table in tables(replace(result, students=[student], differences=[])):
        console.print(table)
    assert console.file.getvalue().count(hostile) == 4


def test_a_job_survives_its_file(plan, tmp_path: Path):
    job = job_of(plan, plan.students[0], plan.held_out[0])
    job.write(tmp_path)
    assert Job.read(tmp_path) == job and not job.spec.openrlhf["trust_remote_code"] and job.spec.max_len == 176


def test_answers_survive_their_file(found, tmp_path: Path):
    write_answers(tmp_path, found[0])
    assert read_answers(tmp_path) == found[0]
