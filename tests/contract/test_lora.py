"""A student with LoRA adapters in OpenRLHF's trainer and DeepSpeed: what is trained, sent, saved and gone on from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.contract.ranks import run_ranks
from tests.recipes import PAIR

RUNS = {  # ranks -> stage of ZeRO and case, of tests/contract/lora_run.py
    1: ("0:all linear layers", "0:the head"),
    2: ("2:all linear layers", "3:the head"),
}
NAMES = [name for names in RUNS.values() for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What lora_run.py found, by stage and case: one process and, beside it, two."""
    folder = tmp_path_factory.mktemp("lora")
    _student(folder / "student")
    student = str(folder / "student")
    run_ranks("lora_run", {folder / str(ranks): (ranks, [student, *names]) for ranks, names in RUNS.items()})
    return {k: v for ranks in RUNS for k, v in json.loads((folder / str(ranks) / "lora.json").read_text()).items()}


def _student(folder: Path) -> None:
    """That of the quickstart, with an output head of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(PAIR / "student", dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(PAIR / "student").save_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
def test_engines_get_the_base_and_then_what_was_learnt(found: dict[str, dict], name: str) -> None:
    """Adapters begin as zero. The trainer's own base never moves (the run asserts it), and each adapted layer does."""
    run = found[name]
    assert run["untouched"]
    adapted = ["_proj"] if "linear" in name else ["q_proj", "lm_head"]
    assert run["moved"] and all(any(part in weight for part in adapted) for weight in run["moved"])
    assert len(run["moved"]) == (14 if "linear" in name else 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_adapter_is_what_the_engines_got(found: dict[str, dict], name: str) -> None:
    """To the bit, when it is merged with its base; at ZeRO-3 OpenRLHF saves a pickle."""
    assert found[name]["saved"]
    weights = "adapter_model.bin" if name.startswith("3") else "adapter_model.safetensors"
    assert {weights, "adapter_config.json", "config.json", "tokenizer.json"} <= set(found[name]["files"])
    assert not any(file.startswith("model.") for file in found[name]["files"])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_its_checkpoint(found: dict[str, dict], name: str) -> None:
    """The second step after a load is, to the bit, the one that followed the save."""
    assert found[name]["resumed"]


@pytest.mark.parametrize("name", RUNS[2])
def test_ranks_and_stages_make_the_same_updates(found: dict[str, dict], name: str) -> None:
    alone = found[f"0{name[1:]}"]
    distance = math.dist(found[name]["update"], alone["update"]) / math.hypot(*alone["update"])
    assert distance < 2e-4
    assert found[name]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["losses"][0] != pytest.approx(alone["losses"][1], rel=1e-3), "nothing was learnt"
