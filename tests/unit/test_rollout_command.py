"""The prompt file of `skd rollout`: both of its forms, and an error that names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import load_models
from skd_plugin.prepare.rows import check_references
from skd_plugin.rollout_command import Prompt, read_prompts


class Letters:
    """A tokenizer of 26 letters."""

    def __len__(self) -> int:
        return 26

    def __call__(self, text: str, add_special_tokens: bool):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(char) - ord("a") for char in text]})


@pytest.fixture
def read(tmp_path: Path):
    """`read(text)`: the prompts of a file with this text; of at most 6 tokens."""

    def read_text(text: str, longest: int = 6) -> list[Prompt]:
        path = tmp_path / "prompts.jsonl"
        path.write_text(text)
        return read_prompts(path, Letters(), longest)

    return read_text


def test_both_forms_in_the_order_of_the_file(read) -> None:
    text = '{"prompt": "abc"}\n\n{"prompt_ids": [25, 0], "reference": "xy"}\n{"prompt": "ba", "note": 1}\n'
    assert [(ids, reference) for ids, reference, _ in read(text)] == [
        ([0, 1, 2], None),
        ([25, 0], "xy"),
        ([1, 0], None),
    ]
    assert [prompt.where.rpartition(", ")[2] for prompt in read(text)] == ["line 1", "line 3", "line 4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "a line is"),
        ('{"text": "abc"}', "a line is"),
        ('{"prompt": ["abc"]}', "a line is"),
        ('{"prompt_ids": "abc"}', "a line is"),
        ('{"prompt_ids": [1, 26]}', "with ids below 26"),
        ('{"prompt_ids": [1, -1]}', "with ids below 26"),
        ('{"prompt_ids": [1, 2.0]}', "with ids below 26"),
        ('{"prompt": "a"}', "the prompt has 1 tokens; 2 to 6 fit"),
        ('{"prompt": "abc", "reference": 3}', '"reference" is 3, but must be a text'),
        ('{"prompt": "abc", "reference": ""}', "must be a text"),
        ('{"prompt_ids": []}', "the prompt has 0 tokens; 2 to 6 fit"),
        ('{"prompt": "abcdefg"}', "the prompt has 7 tokens; 2 to 6 fit"),
    ],
)
def test_wrong_line_is_named(read, line: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read('{"prompt": "abcdef"}\n\n' + line)
    assert "prompts.jsonl, line 3" in str(caught.value) and message in str(caught.value)


def test_without_a_limit_one_token_is_left_for_the_response(read) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    own = ["skd.task=null", "openrlhf.data.max_len=10"]
    assert load_models(recipe, [*own, "skd.rollout.max_new_tokens=4"]).longest_prompt == 6
    assert load_models(recipe, [*own, "skd.rollout.max_new_tokens=null"]).longest_prompt == 9


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_file(read, text: str) -> None:
    with pytest.raises(RecipeError, match="holds no prompt"):
        read(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--prompts: there is no file .*none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl", Letters(), 6)


def test_missing_reference_is_named() -> None:
    check_references([("p.jsonl, line 1", "a")])
    with pytest.raises(RecipeError, match=r"p\.jsonl, line 4 has no reference \(there\), which skd\.rollout\.method"):
        check_references([("p.jsonl, line 1", "a"), ("p.jsonl, line 4", None)], "(there)")
    with pytest.raises(RecipeError, match=r"line 4 has no reference, which skd\.rollout\.method needs"):
        check_references([("line 4", "")])
