"""A recipe that is wrong in any way is one line that says so, and never a traceback."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skd_plugin.config.host_options import host_parser
from skd_plugin.config.run import Run
from skd_plugin.config.schema import field_docs
from skd_plugin.errors import RecipeError
from skd_plugin.prepare import model_checks
from skd_plugin.prepare.load_run import load_run
from tests.recipes import QUICKSTART, SMALL

KEYS = [
    "skd",
    "openrlhf",
    *field_docs(),
    *(f"openrlhf.{action.dest}" for action in host_parser()._actions if action.dest != "help"),
    *(f"skd.vllm.{name}" for name in ("max_num_seqs", "max_model_len", "model", "gpu_memory_utilization", "seed")),
    *(f"skd.task.{name}" for name in ("name", "path", "template", "weight", "seed", "top_k", "train_prompts")),
    "skd.tasks",
]
# YAML of what people write and of what nobody should.
VALUES = [
    "null", "true", "false", "0", "1", "-1", "2", "7", "64", "0.5", "1.0", "-0.5", "1e-6", "1e400", ".nan", ".inf",
    "-.inf", "9223372036854775808", "''", "x", "'[/INST] [a, b]'", "--help", "-1x", "'\u00fc\u20ac'", "[]", "{}",
    "[1]", "[1, 2]", "[0.9, 0.1]", "[a, b]", "[[1]]", "{a: 1}", "{a: {b: 1}}", "[{}]", "[{name: arithmetic}]",
    "{kind: linear, from: 5, to: 1}", "{kind: x}", "{kind: [1]}", "org/name", "./nothing", "/", "/dev/null", ".",
    "skd", "auto", "full", "a.py", "a,b", "2024-01-01", "1:30", "!!set {a}", "&a [*a]",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory):
    """Names that are no folders are looked up nowhere, and what is there is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(tmp_path_factory.mktemp("empty"))
        for name in ("load_tokenizer", "load_model_config"):
            patch.setattr(model_checks, name, cache(getattr(model_checks, name)))
        yield


def end_of(recipe: Path, overrides: Sequence[str]) -> Run | str:
    """The run, or the line that a person is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load_run(recipe, [*SMALL, *overrides])
        except RecipeError as error:
            return str(error)


def is_an_end(found: Run | str) -> bool:
    return isinstance(found, Run) or ("\n" not in found and 0 < len(found) < 1000)


# What a dataset can be called, and a template can be, beside VALUES.
DATA_VALUES = [
    "own.jsonl,own.jsonl", "'own.jsonl, '", "own.jsonl@x", "'@'", "'*.jsonl'", "own.py", "none.csv", "none.parquet",
    "https://x.invalid/own.jsonl", "s3://x/own.jsonl", "hf://datasets/x/own", "'{}'", "'{{}}'", "'{0}{0}'", "'{!r}'",
    "'{:>9999999999}'", "'{.__class__}'", "'0.5,0.5'", "'1,0'", "input", "label", "train", "test",
]  # fmt: skip
DATA_KEYS = [key for key in KEYS if key.startswith(("openrlhf.data.", "openrlhf.eval."))]

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=2))
def test_any_value_of_any_option(changes: list[tuple[str, str]]) -> None:
    assert is_an_end(end_of(QUICKSTART, [f"{key}={value}" for key, value in changes]))


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(DATA_KEYS), st.sampled_from(VALUES + DATA_VALUES)), max_size=2))
def test_any_value_of_the_options_of_a_dataset(changes: list[tuple[str, str]]) -> None:
    Path("own.jsonl").write_text('{"input": "tom has 3 coins .", "label": "x"}\n' * 4)
    given_ones = [f"{key}={value}" for key, value in changes if value != "/"]  # which would be read whole
    small = ["skd.task=null", f"openrlhf.data.prompt_dataset={Path('own.jsonl').resolve()}"]
    assert is_an_end(end_of(QUICKSTART, [*small, *given_ones]))


@FUZZ
@given(
    place=st.integers(0, len(QUICKSTART.read_bytes())),
    cut=st.integers(0, 30),
    put=st.one_of(st.binary(max_size=4), st.sampled_from([value.encode() for value in VALUES])),
)
def test_any_bytes_in_the_file(place: int, cut: int, put: bytes) -> None:
    content = QUICKSTART.read_bytes().replace(b"./", f"{QUICKSTART.parent}/".encode())
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "own.yaml"
        recipe.write_bytes(content[:place] + put + content[place + cut :])
        assert is_an_end(end_of(recipe, []))
