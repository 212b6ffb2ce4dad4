"""Prompts of the teacher's own: made of rows and tasks, checked before a run, carried to the engine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skd_plugin.config.context import engine_len
from skd_plugin.config.host_options import host_defaults
from skd_plugin.config.schema import parse_skd
from skd_plugin.errors import RecipeError
from skd_plugin.evaluate.plan import make_plan
from skd_plugin.host.prompts import PromptForm
from skd_plugin.host.teacher_prompts import PairedPrompt, is_thinking, teacher_prompt, teachers_ids
from skd_plugin.models import load_tokenizer
from skd_plugin.prepare.load_run import load_models, load_run
from skd_plugin.prepare.model_checks import check_attention
from skd_plugin.rollout_command import read_prompts
from skd_plugin.tasks.label import Label
from tests.recipes import PAIR
from tests.unit.test_datasets import in_the_controller

CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
SWITCHED = CHAT + "{% if thinks %}<think> {% endif %}"
ROWS = [{"input": f"tom has {n} coins .", "solution": f"the answer is {n}", "other": None} for n in range(1, 5)]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe(teacher's section, rows=..., chat=..., **more of skd)`: with a dataset for training and evaluations."""

    def write(teacher: dict[str, Any], rows: Any = ROWS, chat: dict[str, str] | None = None, **skd: Any) -> Path:
        folders = {}
        for role in ("teacher", "student"):
            folders[role] = tmp_path / role
            folders[role].mkdir(exist_ok=True)
            for file in (PAIR / role).iterdir():
                (folders[role] / file.name).write_bytes(file.read_bytes())
            (folders[role] / "chat_template.jinja").unlink(missing_ok=True)
            if chat is not None:
                (folders[role] / "chat_template.jinja").write_text(chat[role])
        (tmp_path / "rows.jsonl").write_text(lines(*rows))
        data = {
            "prompt_dataset": str(tmp_path / "rows.jsonl"),
            "max_len": 160,
            "apply_chat_template": chat is not None,
        }
        host = {
            "actor": {"model_name_or_path": str(folders["student"])},
            "data": data,
            "eval": {"dataset": data["prompt_dataset"]},
            "rollout": {"batch_size": 2},
            "train": {"batch_size": 2},
        }
        own = {"teacher": {"model_name_or_path": str(folders["teacher"]), **teacher}, "run_dir": str(tmp_path / "run")}
        sizes = {"rollout": {"max_new_tokens": 64, "top_k": 3}, "loss": {"teacher_top_k": 8}}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"openrlhf": host, "skd": {**sizes, **own, **skd}}))
        return path

    return write


def pairs(path: Path) -> list[tuple[str, str | None]]:
    return [(str(prompt), teacher_prompt(prompt)) for prompt in load_run(path).prompts]


def test_without_one_the_teacher_reads_the_students(recipe) -> None:
    assert pairs(recipe({}))[0] == ("tom has 1 coins .", None)


def test_a_template_with_columns(recipe) -> None:
    template = "{solution} . {input} how many coins ?"
    found = pairs(recipe({"prompt": {"template": template}}))
    assert found[2] == ("tom has 3 coins .", "the answer is 3 . tom has 3 coins . how many coins ?")


def test_a_system_prompt_and_examples_without_a_chat_template(recipe, tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text(json.dumps([{"input": "ann has 2 keys .", "output": " the answer is 2"}]))
    found = pairs(recipe({"prompt": {"system": "add .", "examples": str(tmp_path / "few.json")}}))
    assert found[0][1] == "add .\n\nann has 2 keys . the answer is 2\n\ntom has 1 coins ."


def test_each_model_has_its_own_chat_template(recipe, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(lines({"input": "ann has 2 keys .", "output": "the answer is 2"}))
    prompt = {"system": "add .", "template": "{solution} . {input}", "examples": str(tmp_path / "few.jsonl")}
    chat = {"student": CHAT, "teacher": CHAT.replace("<", "+").replace(">", "-")}
    assert pairs(recipe({"prompt": prompt}, chat=chat))[0] == (
        "<user> tom has 1 coins . ",
        "+system- add . +user- ann has 2 keys . +assistant- the answer is 2 "
        "+user- the answer is 1 . tom has 1 coins . ",
    )


def test_messages_keep_their_turns_and_change_the_last(recipe) -> None:
    turns = [
        {"role": "system", "content": "be kind ."},
        {"role": "user", "content": "ann has 2 keys ."},
        {"role": "assistant", "content": "so ."},
        {"role": "user", "content": "how many ?"},
    ]
    rows = [{"input": turns, "solution": "2"}] * 2
    chat = dict.fromkeys(("student", "teacher"), CHAT)
    prompt = {"system": "add .", "template": "{solution} . {input}"}
    student, teacher = pairs(recipe({"prompt": prompt}, rows, chat))[0]
    assert student.startswith("<system> be kind .") and student.endswith("<user> how many ? ")
    assert teacher == "<system> add . <user> ann has 2 keys . <assistant> so . <user> 2 . how many ? "


def test_a_column_of_ready_prompts(recipe) -> None:
    rows = [{**row, "ready": [{"role": "user", "content": f"say {n} now . so ."}]} for n, row in enumerate(ROWS)]
    chat = dict.fromkeys(("student", "teacher"), CHAT)
    assert pairs(recipe({"prompt": {"column": "ready"}}, rows, chat))[1][1] == "<user> say 1 now . so . "
    rows = [{**row, "ready": f"say {n} now . so ."} for n, row in enumerate(ROWS)]
    assert pairs(recipe({"prompt": {"column": "ready"}}, rows))[1][1] == "say 1 now . so ."


def test_switches_of_the_chat_templates(recipe) -> None:
    chat = dict.fromkeys(("student", "teacher"), SWITCHED)
    both = {
        "teacher": {"chat_template_kwargs": {"thinks": True}},
        "student": {"chat_template_kwargs": {"thinks": True}},
    }
    (student, teacher), *_ = pairs(recipe(both["teacher"], chat=chat, student=both["student"]))
    assert student == teacher and student.endswith("<think> ")
    with pytest.raises(
        RecipeError, match=r"the teacher's prompt alone ends inside a thinking block .*own_thinking=tr"
    ):
        load_run(recipe(both["teacher"], chat=chat))
    (student, teacher), *_ = pairs(recipe({**both["teacher"], "own_thinking": True}, chat=chat))
    assert not is_thinking(student) and is_thinking(teacher)
    with pytest.raises(RecipeError, match=r"skd\.teacher\.chat_template_kwargs: the chat template has no 'thinkz'"):
        load_run(recipe({"chat_template_kwargs": {"thinkz": True}}, chat=chat))
    for section in ("teacher", "student"):
        own = {section: both[section]} if section == "student" else {}
        with pytest.raises(RecipeError, match=rf"skd\.{section}\.chat_template_kwargs has no effect"):
            load_run(recipe(both["teacher"] if section == "teacher" else {}, **own))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"template": "{solutio} {input}"}, r"rows\.jsonl has no column 'solutio' \(skd\.teacher\.prompt\)"),
        ({"template": "{other} {input}"}, r"jsonl, line 1: the teacher's prompt needs 'other', which is not there"),
        ({"template": "{input"}, r"is '\{input': expected '\}' before end of string; write \{\{ and"),
        ({"template": "{input.name}"}, r"a place is more than the name of a column"),
        ({"template": "{}"}, r"a place is more than the name of a column"),
        ({"template": "{input:>9}"}, r"a place is more than the name of a column"),
        ({"template": "no place"}, r"must name a column in braces"),
        ({"template": "a", "column": "b"}, r"template and column both make the teacher's prompt"),
        ({"column": "none"}, r"has no column 'none' \(skd\.teacher\.prompt\)"),
        ({"column": "other"}, r"line 1: 'other' is missing or null, but must be a text"),
        ({"examples": "none.jsonl"}, r"skd\.teacher\.prompt\.examples: .*none\.jsonl cannot be read"),
        ({"template": "{solution}"}, r"line 1: the teacher's prompt has 4 tokens, the student's 5: in the engine"),
        ({"template": "{input} " + "the answer is {solution} . " * 20}, r"has \d+ tokens, but 96 fit: set .*max_len"),
    ],
)  # fmt: skip
def test_what_makes_no_prompt_is_refused(recipe, prompt: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_run(recipe({"prompt": prompt}))


def test_elsewhere_it_may_be_the_shorter_one(recipe) -> None:
    """The student lives in the teacher's places only where both are in one engine."""
    path = recipe({"prompt": {"template": "{solution}"}, "url": "http://host:1"}, rollout={"method": "on_policy"})
    assert pairs(path)[0] == ("tom has 1 coins .", "the answer is 1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", "is no JSON"),
        ('{"input": "a"}', r"example 1 is \{'input': 'a'\}, but must be"),
        ('[{"input": "a", "output": 3}]', "example 1 is"),
    ],
)
def test_files_that_hold_no_examples(recipe, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "few.json").write_text(content)
    with pytest.raises(RecipeError, match=f"few.json{'' if message[0] == 'i' else ':'} {message}"):
        load_run(recipe({"prompt": {"examples": str(tmp_path / "few.json")}}))


def test_a_longer_prompt_of_the_teacher_has_room(recipe) -> None:
    template = "{input} " + "the answer is {solution} . " * 12
    own = recipe({"prompt": {"template": template, "max_len": 130}})
    run = load_run(own)
    assert engine_len({**host_defaults(), **run.host}, run.skd.longest_teacher_prompt) == 130 + 64
    with pytest.raises(RecipeError, match=r"skd\.teacher\.prompt\.max_len and .* need a context of 9\d\d tokens"):
        load_run(recipe({"prompt": {"template": template, "max_len": 900}}))


def test_other_examples_are_another_run(recipe, tmp_path: Path) -> None:
    digests = []
    for answer in ("2", "3"):
        (tmp_path / "few.jsonl").write_text(lines({"input": "ann has 2 keys .", "output": f" the answer is {answer}"}))
        digests.append(load_run(recipe({"prompt": {"examples": str(tmp_path / "few.jsonl")}})).data_digest)
    assert len(set(digests)) == 2


# --- tasks ---


def test_a_task_says_what_it_knows(quickstart) -> None:
    run = quickstart('skd.teacher.prompt={template: "{reference} . {answer} . {input}", max_len: 140}')
    for prompt, row in zip(run.prompts, run.data["train"], strict=True):
        label = Label.parse(row["label"])
        assert teacher_prompt(prompt) == row["teacher_prompt"] == f"{label.reference} . {label.answer} . {prompt}"
    assert all("teacher_prompt" in row for row in run.data["test"])


def test_tasks_have_prompts_of_their_own(quickstart) -> None:
    tasks = (
        "skd.tasks=[{name: arithmetic, train_prompts: 2, eval_prompts: 0, "
        'teacher_prompt: {template: "so . {input}"}}, '
        "{name: instructions, train_prompts: 2, eval_prompts: 0}]"
    )
    rows = quickstart("skd.task=null", tasks).data["train"]
    for row in rows:
        own = f"so . {row['input']}" if row["datasource"] == "arithmetic" else row["input"]
        assert row["teacher_prompt"] == own
    with pytest.raises(RecipeError, match="has a column, but task arithmetic makes its prompts"):
        quickstart("skd.task.teacher_prompt={column: a}")


# --- on the way ---


def test_prompts_of_the_run_carry_their_pairs(recipe) -> None:
    own = recipe({"prompt": {"template": "{solution} . {input}"}})
    found = in_the_controller(own)
    assert [teacher_prompt(prompt) for prompt in found.prompts] == [teacher for _, teacher in pairs(own)]
    assert teacher_prompt(pickle.loads(pickle.dumps(found.prompts[0]))) == "the answer is 1 . tom has 1 coins ."


def test_what_the_teacher_reads_in_later_turns() -> None:
    tokenizer = load_tokenizer(str(PAIR / "student"), "student")
    pair = PairedPrompt("tom has 3 coins .", "the answer is 3 . tom has 3 coins .")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    later = ids(pair + " first 3 + 4 =") + ids(" 7 .")
    assert teachers_ids(pair, later, tokenizer, tokenizer) == ids(pair.teacher + " first 3 + 4 =") + ids(" 7 .")
    with pytest.raises(ValueError, match="does not begin with that: 'ann has"):
        teachers_ids(pair, ids("ann has 3 coins ."), tokenizer, tokenizer)


def test_the_commands_read_both_prompts(recipe, tmp_path: Path) -> None:
    own = recipe({"prompt": {"template": "{solution} . {input}"}})
    models = load_models(own)
    texts = ["the answer is 2 . tom has 2 coins .", "tom has 2 coins ."]
    ids, student = models.tokenizer(texts, add_special_tokens=False).input_ids
    (held_out,) = make_plan(str(own), [], [], ["distance"]).held_out
    assert held_out[1].prompt.of_teacher == ids and held_out[1].prompt.ids == student
    rows = read_prompts(str(tmp_path / "rows.jsonl"), models, raw=False)
    assert rows[1].teacher_ids == ids and rows[1].teacher_text == "the answer is 2 . tom has 2 coins ."
    assert read_prompts(str(tmp_path / "rows.jsonl"), models, raw=True)[1].teacher_ids is None


def test_a_plan_without_a_teacher_makes_no_prompts_of_it(recipe) -> None:
    (held_out,) = make_plan(str(recipe({"prompt": {"template": "{solution} . {input}"}})), [], [], ["scores"]).held_out
    assert held_out[0].prompt.teacher_ids is None


def test_windows_alone_do_not_go_with_a_prompt_of_the_teachers() -> None:
    from transformers import Gemma2Config, MistralConfig

    window, mixed = MistralConfig(sliding_window=16), Gemma2Config(sliding_window=16, num_hidden_layers=2)
    check_attention({"teacher": window, "student": window})
    check_attention({"teacher": window, "student": mixed}, own_prompts=True)
    with pytest.raises(RecipeError, match="where all layers of both models have a window"):
        check_attention({"teacher": window, "student": window}, own_prompts=True)


def test_forms_that_are_nobodys() -> None:
    skd = parse_skd({"teacher": {"model_name_or_path": "t"}})
    assert skd.teacher_prompts == [] and skd.longest_teacher_prompt is None
    assert PromptForm("input").columns == ["input"]
