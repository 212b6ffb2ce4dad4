"""Recipe files: bases, paths and overrides."""

from __future__ import annotations

import os
import time
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


LIMIT_S = 2.0
LEVELS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"skd: {run_dir: " + b"x" * 10_000_000 + b"}", r"has 10,000,016 bytes, but a recipe has at most 131,072"),
        (b"- 1\n" * 30_000, r"stands for more than 10,000 values"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", r"is not text in UTF-8 \(byte 9\); a recipe is a YAML file"),
        (b"\x00\x01\x02", r"is not valid YAML: unacceptable character"),
        (b"skd: {device: cpu}\nopenrlhf: {}\nskd: {device: cuda}", r"line 3, column 1: the key 'skd' is there twice"),
        (b"skd:\n  device: cpu\n  device: cuda", r"line 3, column 3: the key 'device' is there twice"),
        (b"skd: {vllm: {on: 1}}", r"line 1, column 14: the key 'on' is no text; quote it"),
        (b"skd: {[1, 2]: 1}", r"the key a list or mapping is no text"),
        (b"skd: 1\nopenrlhf:\n\t- x", r"line 3, column 1: found character"),
        (b"a0: &a0 [x]\n" + LEVELS.encode(), r"stands for more than 10,000 values"),
        (b"skd: &a {vllm: *a}", r"line 1: an alias stands for what it is in"),
        (b"skd: " + b"[" * 100_000, r"is nested more than 50 deep"),
        (b"skd: " + b"{a: " * 60 + b"1" + b"}" * 60, r"is nested more than 50 deep"),
        (b"skd: {run_dir: !!python/name:os.system x}", r"could not determine a constructor"),
        (b"skd: {run_dir: !!binary aGk=}", r"could not determine a constructor"),
        (b'skd: {run_dir: "a\\0b"}', r"holds a null character"),
        (b"skd: {cpu: !!bool 1}", r"a value is not of the kind that its tag"),
        (b"skd: {cpu: !!int ''}", r"a value is not of the kind that its tag"),
        (b'skd: {run_dir: "\\ud800"}', r"half a character"),
        (b"skd: {traces_per_step: " + b"1" * 5000 + b"}", r"is not valid YAML: Exceeds the limit"),
        (b"a: 1\n---\nb: 2", r"line 2, column 1: but found another document"),
    ],
)
def test_a_hostile_file_is_one_line_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_bytes(content)
    started = time.process_time()
    with pytest.raises(RecipeError, match=message) as found:
        load_recipe(recipe)
    assert time.process_time() - started < LIMIT_S
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


@pytest.mark.parametrize("value", ["{a: 1, a: 2}", "[" * 5000, "&a [*a]", "{1: 2}", "[1", '"\\0"', "1" * 300_000])
def test_a_hostile_override_is_one_line(write, value: str) -> None:
    with pytest.raises(RecipeError, match=r"^'skd\.vllm=.*': the value is not valid YAML: ") as found:
        load_recipe(write("own.yaml", ""), [f"skd.vllm={value}"])
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_a_place_without_a_recipe(tmp_path: Path, write) -> None:
    with pytest.raises(RecipeError, match=f"{tmp_path} is a folder; name the recipe"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        load_recipe(tmp_path / ("x" * 5000))
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read: Symlink loop|no recipe at"):
        load_recipe(tmp_path / "loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match="there is no recipe at"):
        load_recipe(tmp_path / "pipe.yaml")


def test_bases_in_a_circle_or_a_long_chain(write, tmp_path: Path) -> None:
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: c.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml: the recipe is its own base"):
        load_recipe(write("c.yaml", "base: a.yaml").with_name("a.yaml"))
    for number in range(100):
        write(f"{number}.yaml", f"base: {number + 1}.yaml")
    with pytest.raises(RecipeError, match=r"21\.yaml: more than 20 recipes are each the base"):
        load_recipe(tmp_path / "0.yaml")


def test_aliases_and_merges_of_a_persons_size_work(write) -> None:
    text = "skd: {vllm: {x: &x {a: 1, b: 2}, y: *x, z: {<<: *x, b: 3}}, run_dir: 2024-01-01}"
    loaded = load_recipe(write("own.yaml", text))["skd"]
    assert loaded["vllm"] == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 2}, "z": {"a": 1, "b": 3}}
    assert loaded["run_dir"] == "2024-01-01"


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
