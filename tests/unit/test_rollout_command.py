"""The prompt file of `skd rollout`: both of its forms, and an error that names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_plugin.errors import RecipeError
from skd_plugin.rollout_command import Prompt, check_references, read_prompts


class Letters:
    """A tokenizer of 26 letters."""

    def __len__(self) -> int:
        return 26

    def __call__(self, text: str, add_special_tokens: bool):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(char) - ord("a") for char in text]})


@pytest.fixture
def read(tmp_path: Path):
    """`read(text)`: the prompts of a file with this text; 10 tokens in all, 4 of them for the response."""

    def read_text(text: str, max_new_tokens: int | None = 4) -> list[Prompt]:
        path = tmp_path / "prompts.jsonl"
        path.write_text(text)
        return read_prompts(path, Letters(), 10, max_new_tokens)

    return read_text


def test_both_forms_in_the_order_of_the_file(read) -> None:
    text = '{"prompt": "abc"}\n\n{"prompt_ids": [25, 0], "reference": "xy"}\n{"prompt": "ba", "note": 1}\n'
    assert read(text) == [Prompt([0, 1, 2], None, 1), Prompt([25, 0], "xy", 3), Prompt([1, 0], None, 4)]


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
    assert read('{"prompt": "abcdefghi"}', max_new_tokens=None) == [Prompt(list(range(9)), None, 1)]
    with pytest.raises(RecipeError, match="2 to 9 fit"):
        read('{"prompt": "abcdefghij"}', max_new_tokens=None)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_file(read, text: str) -> None:
    with pytest.raises(RecipeError, match="holds no prompt"):
        read(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--prompts: there is no file .*none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl", Letters(), 10, None)


def test_missing_reference_is_named() -> None:
    check_references([Prompt([1, 2], "a", 1)], "p.jsonl")
    with pytest.raises(RecipeError, match=r"p\.jsonl, line 4: skd\.rollout\.method needs a reference"):
        check_references([Prompt([1, 2], "a", 1), Prompt([1, 2], None, 4)], "p.jsonl")
