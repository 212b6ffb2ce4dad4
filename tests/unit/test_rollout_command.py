"""The prompt file of `skd rollout`: its forms, how prompts are made of it, and an error that names the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import load_models
from skd_plugin.prepare.prompts import check_references
from skd_plugin.rollout_command import Prompt, read_prompts
from tests.recipes import QUICKSTART


@pytest.fixture
def read(tmp_path: Path, tiny_pair: Path):
    """`read(text, *overrides)`: the prompts of a file with this text; of at most 6 tokens, which are letters."""
    models = {"actor": {"model_name_or_path": str(tiny_pair / "student")}, "data": {"max_len": 10}}
    skd = {"teacher": {"model_name_or_path": str(tiny_pair / "teacher")}, "rollout": {"max_new_tokens": 4, "top_k": 4}}
    recipe = tmp_path / "own.yaml"
    recipe.write_text(json.dumps({"openrlhf": models, "skd": {**skd, "loss": {"teacher_top_k": 8}}}))

    def read_text(text: str, *overrides: str, raw: bool = False) -> list[Prompt]:
        path = tmp_path / "prompts.jsonl"
        path.write_text(text)
        return read_prompts(str(path), load_models(recipe, overrides), raw=raw)

    return read_text


A, B, C, Z, PLUS = 3, 4, 5, 28, 30  # ids


def test_both_forms_in_the_order_of_the_file(read) -> None:
    text = '{"prompt": "abc"}\n\n{"prompt_ids": [28, 3], "reference": "xy"}\n{"prompt": "ba", "note": 1}\n'
    assert [(prompt.ids, prompt.reference, prompt.form) for prompt in read(text)] == [
        ([A, B, C], None, "the text as it is"),
        ([Z, A], "xy", "token ids as they are"),
        ([B, A], None, "the text as it is"),
    ]
    assert [prompt.where.rpartition(", ")[2] for prompt in read(text)] == ["line 1", "line 3", "line 4"]


def test_prompts_are_made_as_training_makes_them(read) -> None:
    """By the recipe's template and column, unless --raw asks for the text."""
    template, key = "openrlhf.data.input_template='{}+'", "openrlhf.data.input_key=q"
    for column in ("prompt", "q"):
        text = json.dumps({column: "ab"})
        assert read(text, template, key)[0][::3] == ([A, B, PLUS], "openrlhf.data.input_template")
        assert read(text, template, key, raw=True)[0][::3] == ([A, B], "the text as it is")
        assert read(text, key)[0].ids == [A, B]
    both = '{"q": "ab", "prompt": "ba", "a": "c"}'
    assert read(both, key, "openrlhf.data.label_key=a")[0][:2] == ([A, B], "c")
    assert read('{"prompt_ids": [3, 4]}', template)[0].ids == [A, B]


def test_a_tasks_own_prompts_are_those_of_its_run(quickstart) -> None:
    run = quickstart("openrlhf.data.input_template='{} so'", "openrlhf.data.input_key=other")
    run.save()
    models = load_models(QUICKSTART, ["openrlhf.data.input_template='{} so'", "openrlhf.data.input_key=other"])
    given = read_prompts(run.host["data.prompt_dataset"], models, raw=False)
    assert [models.tokenizer.decode(prompt.ids) for prompt in given] == list(run.prompts)
    assert all("the answer is" in (prompt.reference or "") for prompt in given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[1, 2]", "line 3 is [1, 2], but a line is one JSON object"),
        ('{"text": "abc"}', "line 3: 'prompt' is missing or null"),
        ('{"prompt": ["abc"]}', "line 3: 'prompt' is ['abc'], but must be a text"),
        ('{"prompt_ids": "abc"}', "line 3: 'prompt_ids' is 'abc', but must be a list of token ids below 32"),
        ('{"prompt_ids": [1, 32]}', "list of token ids below 32"),
        ('{"prompt_ids": [1, -1]}', "list of token ids below 32"),
        ('{"prompt_ids": [1, 2.5]}', "list of token ids below 32"),
        ('{"prompt": "a"}', "line 3: the prompt has 1 tokens; 2 to 6 fit"),
        ('{"prompt": "abc", "reference": 3}', 'line 3: "reference" is 3, but must be a text'),
        ('{"prompt": "abc", "reference": ""}', "line 3: \"reference\" is '', but must be a text"),
        ('{"prompt_ids": []}', "line 3: the prompt has 0 tokens; 2 to 6 fit"),
        ('{"prompt": "abcdefg"}', "line 3: the prompt has 7 tokens; 2 to 6 fit"),
    ],
)
def test_wrong_line_is_named(read, line: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read('{"prompt": "abcdef"}\n{"prompt": "abc"}\n' + line)
    assert "prompts.jsonl" in str(caught.value) and message in str(caught.value)


def test_columns_that_are_not_there(read) -> None:
    message = r"no column 'input' \(openrlhf\.data\.input_key\), nor 'prompt' or 'prompt_ids'; it has text, a"
    with pytest.raises(RecipeError, match=message):
        read('{"text": "abc", "a": 1}')


def test_without_a_limit_one_token_is_left_for_the_response() -> None:
    own = ["skd.task=null", "openrlhf.data.max_len=10"]
    assert load_models(QUICKSTART, [*own, "skd.rollout.max_new_tokens=4"]).longest_prompt == 6
    assert load_models(QUICKSTART, [*own, "skd.rollout.max_new_tokens=null"]).longest_prompt == 9


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_file(read, text: str) -> None:
    with pytest.raises(RecipeError, match=r"--prompts: .*prompts\.jsonl cannot be read: the file is empty"):
        read(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--prompts: there is no file .*none\.jsonl"):
        read_prompts(str(tmp_path / "none.jsonl"), load_models(QUICKSTART), raw=False)


def test_missing_reference_is_named() -> None:
    check_references([("p.jsonl, line 1", "a")])
    with pytest.raises(RecipeError, match=r"p\.jsonl, line 4 has no reference \(there\), which skd\.rollout\.method"):
        check_references([("p.jsonl, line 1", "a"), ("p.jsonl, line 4", None)], "(there)")
    with pytest.raises(RecipeError, match=r"line 4 has no reference, which skd\.rollout\.method needs"):
        check_references([("line 4", "")])
