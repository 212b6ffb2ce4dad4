"""Recipe files: bases, paths and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_plugin.config.recipe import RENAMED, RenamedOption, flatten, load_recipe, set_dotted
from skd_plugin.config.schema import field_docs
from skd_plugin.errors import RecipeError


def test_recipe_wins_over_its_base_and_command_line_over_both(write) -> None:
    write("base.yaml", "skd: {rollout: {top_k: 1, draft_len: 2, seed: 3}}\nopenrlhf: {train: {seed: 4}}")
    recipe = write("own.yaml", "base: base.yaml\nskd: {rollout: {draft_len: 20, seed: 30}}")
    merged = load_recipe(recipe, ["skd.rollout.seed=300", "openrlhf.actor.adam.lr=0.5"])
    assert merged["skd"] == {"rollout": {"top_k": 1, "draft_len": 20, "seed": 300}}
    assert merged["openrlhf"] == {"train": {"seed": 4}, "actor": {"adam": {"lr": 0.5}}}
    assert "base" not in merged


def test_a_base_may_have_a_base(write) -> None:
    write("a.yaml", "skd: {run_dir: a, device: cpu, traces_per_step: 1}")
    write("deep/b.yaml", "base: ../a.yaml\nskd: {run_dir: b, device: cuda}")
    recipe = write("c.yaml", "base: deep/b.yaml\nskd: {run_dir: c}")
    assert load_recipe(recipe)["skd"] == {"run_dir": "c", "device": "cuda", "traces_per_step": 1}


def test_dotted_paths_are_relative_to_the_file_that_holds_them(write, tmp_path: Path) -> None:
    write("deep/base.yaml", "skd: {teacher: {model_name_or_path: ./teacher}, vllm: {download_dir: ../up}}")
    recipe = write(
        "own.yaml", "base: deep/base.yaml\nskd: {run_dir: ./run}\nopenrlhf: {data: {prompt_dataset: org/x}}"
    )
    merged = load_recipe(recipe)
    assert merged["skd"]["teacher"]["model_name_or_path"] == str(tmp_path / "deep" / "teacher")
    assert merged["skd"]["vllm"]["download_dir"] == str(tmp_path / "up")
    assert merged["skd"]["run_dir"] == str(tmp_path / "run")
    assert merged["openrlhf"]["data"]["prompt_dataset"] == "org/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skd: {rollout: {top_k: 1", "is not valid YAML"),
        ("- a\n- b", "a recipe is a mapping with the sections openrlhf, skd"),
        ("skdd: {}", "unknown key 'skdd'; did you mean 'skd'"),
        ("base: own.yaml", "the recipe is its own base"),
        ("base: nowhere.yaml", "there is no recipe at .*nowhere.yaml"),
    ],
)
def test_file_that_is_no_recipe(write, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write("own.yaml", text))


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe at .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_override_needs_an_equals_sign(write) -> None:
    with pytest.raises(RecipeError, match=r"'skd\.rollout\.top_k' is no override; write key=value"):
        load_recipe(write("own.yaml", ""), ["skd.rollout.top_k"])


def test_override_below_a_value() -> None:
    with pytest.raises(RecipeError, match=r"'skd\.run_dir\.x': 'run_dir' is a value"):
        set_dotted({"skd": {"run_dir": "r"}}, "skd.run_dir.x", 1)


def test_flatten_is_the_inverse_of_set_dotted() -> None:
    flat = {"a.b.c": 1, "a.b.d": [2], "a.e": None, "f": "g"}
    tree: dict = {}
    for key, value in flat.items():
        set_dotted(tree, key, value)
    assert flatten(tree) == flat


# --- options that were renamed ---

OLD_NAME = r"^skd\.loss\.top_k is now called skd\.loss\.teacher_top_k; the old name still works$"


def test_new_names_are_options_and_old_ones_are_not() -> None:
    assert set(RENAMED.values()) <= set(field_docs()) and not set(RENAMED) & set(field_docs())


@pytest.mark.parametrize(
    ("text", "overrides", "value"),
    [
        ("skd: {loss: {top_k: 8}}", [], 8),
        ("base: base.yaml\nskd: {loss: {top_k: 8}}", [], 8),
        ("base: base.yaml", ["skd.loss.top_k=8"], 8),
        ("base: base.yaml", ["skd.loss={kind: jsd, top_k: 8}"], 8),
        ("base: old.yaml\nskd: {loss: {teacher_top_k: 8}}", [], 8),
        ("base: old.yaml", ["skd.loss.teacher_top_k=8"], 8),
    ],
)
def test_an_old_name_still_works_and_is_told_once(write, text: str, overrides: list[str], value: int) -> None:
    """The file wins over its base and the command line over both, whichever name they use."""
    write("base.yaml", "skd: {loss: {teacher_top_k: 4}}")
    write("old.yaml", "skd: {loss: {top_k: 4}}")
    with pytest.warns(RenamedOption, match=OLD_NAME) as told:
        loss = load_recipe(write("own.yaml", text), overrides)["skd"]["loss"]
    assert loss["teacher_top_k"] == value and "top_k" not in loss
    assert len(told) == 1


def test_a_new_name_tells_nothing(write, recwarn: pytest.WarningsRecorder) -> None:
    recipe = write("own.yaml", "skd: {loss: {teacher_top_k: 8}, rollout: {top_k: 3}}")
    load_recipe(recipe, ["skd.rollout.top_k=4"])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("skd: {loss: {top_k: 8, teacher_top_k: 9}}", []),
        ("", ["skd.loss.top_k=8", "skd.loss.teacher_top_k=9"]),
        ("", ["skd.loss.teacher_top_k=9", "skd.loss.top_k=8"]),
        ("", ["skd.loss={top_k: 8, teacher_top_k: 9}"]),
    ],
)
@pytest.mark.filterwarnings("ignore::skd_plugin.config.recipe.RenamedOption")
def test_both_names_are_one_too_many(write, text: str, overrides: list[str]) -> None:
    message = (
        r"skd\.loss\.top_k is the old name of skd\.loss\.teacher_top_k, and both are given; leave skd\.loss\.top_k"
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(write("own.yaml", text), overrides)
