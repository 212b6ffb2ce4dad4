"""The command line: flags and key=value become overrides, and an error is one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import yaml

from skd_plugin import cli
from skd_plugin.config.recipe import flatten, load_recipe, set_dotted
from skd_plugin.errors import RecipeError
from tests.recipes import QUICKSTART


def test_flags_and_keys_become_overrides() -> None:
    recipe, overrides = cli._recipe_and_overrides(
        ["r.yaml", "skd.loss.kind=reverse_kl", "--skd.rollout.top_k", "7", "--train.batch_size=16",
         "--train.colocate_all", "--actor.adam.betas", "0.5", "0.6", "openrlhf.train.seed=3"]
    )  # fmt: skip
    assert recipe == "r.yaml"
    tree: dict = {}
    for override in overrides:
        key, _, value = override.partition("=")
        set_dotted(tree, key, yaml.safe_load(value))
    assert tree == {
        "skd": {"loss": {"kind": "reverse_kl"}, "rollout": {"top_k": 7}},
        "openrlhf": {
            "train": {"batch_size": 16, "colocate_all": True, "seed": 3},
            "actor": {"adam": {"betas": [0.5, 0.6]}},
        },
    }


def test_no_flag_is_no_override() -> None:
    assert cli._recipe_and_overrides(["r.yaml"]) == ("r.yaml", [])


@pytest.mark.parametrize("argv", [[], ["--train.batch_size", "4"], ["skd.loss.kind=reverse_kl"]])
def test_recipe_comes_first(argv: list[str]) -> None:
    with pytest.raises(RecipeError, match="name the recipe first"):
        cli._recipe_and_overrides(argv)


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--skd.rollout.topk", "--skd.rollout.top_k"), ("--train.batchsize", "--train.batch_size")],
)
def test_unknown_flag_names_the_nearest(flag: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown key '{flag}'; did you mean '{near}'"):
        cli._recipe_and_overrides(["r.yaml", flag, "3"])


TRICKY = [
    pytest.param("--data.input_template", "Q: {}", "data.input_template", id="mapping"),
    pytest.param("--data.input_template", "a=b {}", "data.input_template", id="equals"),
    pytest.param("--data.input_template", "a\nb", "data.input_template", id="newline"),
    pytest.param("--data.input_key", "on", "data.input_key", id="boolean"),
    pytest.param("--data.prompt_dataset", "x" * 60 + " " + "y" * 60, "data.prompt_dataset", id="long"),
]


@pytest.mark.parametrize(("flag", "value", "key"), TRICKY)
def test_text_of_a_host_flag_arrives_unchanged(flag: str, value: str, key: str, write) -> None:
    _, overrides = cli._recipe_and_overrides(["r.yaml", flag, value])
    host = load_recipe(write("own.yaml", ""), overrides)["openrlhf"]
    assert flatten(host) == {key: value}


def test_long_list_of_a_host_flag_arrives_whole() -> None:
    names = [f"a_rather_long_module_name_{i}" for i in range(9)]
    _, overrides = cli._recipe_and_overrides(["r.yaml", "--ds.lora.target_modules", *names])
    assert yaml.safe_load(overrides[0].partition("=")[2]) == names


def test_help_lists_both_kinds_of_options(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--skd.rollout.top_k", "--skd.loss.kind", "--train.batch_size", "--actor.adam.lr"):
        assert option in shown
    assert "(default 25)" in shown


@pytest.mark.parametrize(("argv", "status"), [([], 0), (["--help"], 0), (["trane"], 2), (["trane", "--help"], 2)])
def test_usage(argv: list[str], status: int, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == status
    assert "skd train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "name the recipe first"),
        (["train", "nothing.yaml"], "there is no recipe at"),
        (["train", str(QUICKSTART), "skd.rollout.topk=3"], "did you mean 'skd.rollout.top_k'"),
        (["train", str(QUICKSTART), "openrlhf.train.batchsize=3"], "did you mean 'train.batch_size'"),
        (["train", str(QUICKSTART), "--train.batch_size", "many"], "invalid int value: 'many'"),
        (["train", str(QUICKSTART), "--trane.batch_size", "4"], "did you mean '--train.batch_size'"),
        (["train", str(QUICKSTART), "skd.rollout.top_k=100000"], "skd.rollout.top_k is 100000, but"),
        (["rollout", str(QUICKSTART), "--prompts", "p", "--out", "o", "--samples", "0"], "--samples is 0"),
        (["rollout", str(QUICKSTART), "--prompts", "nothing.jsonl", "--out", "o"], "there is no file nothing.jsonl"),
    ],
)
def test_wrong_command_line_is_one_line_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err
    assert printed.err.startswith(f"skd {argv[0]}: ") and printed.err.count("\n") == 1, printed.err
    assert not os.listdir(tmp_path), "a refused recipe leaves nothing behind"


@pytest.mark.parametrize("given", [["skd.loss.top_k=8"], ["--skd.loss.top_k", "8"]])
@pytest.mark.parametrize("command", ["train", "rollout", "check", "eval"])
def test_an_old_name_is_one_line_of_every_command(command: str, given: list[str], monkeypatch, capsys) -> None:
    """Told once, however often a command reads the recipe; other warnings are shown as ever."""

    def read_twice(argv: list[str]) -> int:
        recipe, overrides = cli._recipe_and_overrides(argv)
        assert [load_recipe(recipe, overrides)["skd"]["loss"]["teacher_top_k"] for _ in range(2)] == [8, 8]
        warnings.warn("another", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, f"_{command}", read_twice)
    with pytest.warns(FutureWarning, match="another"):
        assert cli.main([command, str(QUICKSTART), *given]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == ["notice: skd.loss.top_k is now called skd.loss.teacher_top_k; the old name still works"]
