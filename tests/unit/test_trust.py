"""Nothing of a model's folder runs unless the recipe says so: neither its Python files nor its pickles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from skd_plugin import trust
from skd_plugin.errors import RecipeError
from skd_plugin.models import load_model_config, load_tokenizer
from skd_plugin.prepare.load_run import load_models, load_run

PAIR = Path(__file__).parents[2] / "recipes" / "models" / "arithmetic"
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "llama"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.REMOTE_CODE, "0")
    monkeypatch.setenv(trust.PICKLE_WEIGHTS, "0")


@pytest.fixture(params=["config.json", "tokenizer_config.json"])
def with_code(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A model that brings code, and the file that is there once it has run."""
    folder, marker = tmp_path / "student", tmp_path / "marker"
    shutil.copytree(PAIR / "student", folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((folder / request.param).read_text())
    names = (
        {"AutoConfig": "own.OwnConfig"}
        if request.param == "config.json"
        else {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    )
    (folder / request.param).write_text(json.dumps(settings | {"auto_map": names, "model_type": "own_type"}))
    return folder, marker


def test_a_model_that_brings_code_is_refused_before_it_runs(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    """By what every command begins with, for either model, and by whoever reads one alone."""
    folder, marker = with_code
    message = r"brings code of its own: its (tokenizer_)?config\.json names own\.py, which would run here"
    for option in ("openrlhf.actor.model_name_or_path", "skd.teacher.model_name_or_path"):
        for load in (load_models, load_run):
            with pytest.raises(RecipeError, match=message):
                load(RECIPE, [f"{option}={folder}", f"skd.run_dir={tmp_path / 'run'}"])
    for read in (load_model_config, load_tokenizer):
        with pytest.raises(RecipeError, match=message):
            read(str(folder), "student")
    assert not marker.exists()


def test_a_recipe_may_let_it_run(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    trust.allow(remote_code=True, pickle_weights=False)
    load_model_config(str(folder), "student")
    load_tokenizer(str(folder), "student")
    assert marker.exists()


def test_openrlhf_gets_no_code_either(with_code: tuple[Path, Path]) -> None:
    """It asks for it by itself, wherever it loads a model."""
    from transformers import AutoConfig, AutoTokenizer

    folder, marker = with_code
    trust.close_transformers()
    with pytest.raises(RuntimeError, match=r"own\.py is code that a model brings"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not marker.exists()


def test_weights_that_are_pickles_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(PAIR / "student", folder)
    trust.refuse_pickles(str(folder), "student")
    (folder / "training_args.bin").write_bytes(b"")
    trust.refuse_pickles(str(folder), "student")  # beside safetensors nobody loads them
    (folder / "model.safetensors").unlink()
    trust.refuse_pickles(str(folder), "student")  # no weights at all: others say so
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"has its weights in pickles \(pytorch_model\.bin\)"):
        load_models(RECIPE, [f"openrlhf.actor.model_name_or_path={folder}"])
    trust.allow(remote_code=False, pickle_weights=True)
    trust.refuse_pickles(str(folder), "student")


def test_a_recipe_allows_what_it_says_and_no_other(tmp_path: Path) -> None:
    load_models(RECIPE, ["skd.trust_remote_code=true"])
    assert trust.may_run_code()
    load_models(RECIPE)
    assert not trust.may_run_code()
