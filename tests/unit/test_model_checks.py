"""The two models of a recipe: vocabularies, contexts, output heads; and prompts that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skd_plugin.errors import RecipeError
from skd_plugin.models import common_vocab_size
from skd_plugin.prepare.model_checks import (
    check_experts,
    check_experts_beside,
    check_full_weights,
    check_layers_to_spread,
    check_output_head,
    check_pair,
    check_ring,
    check_vocabularies,
)
from tests.recipes import PAIR


@pytest.fixture
def pair(tmp_path: Path):
    """`pair(teacher={...}, student={...})`: the committed pair with changes in its config.json."""

    def make(**changes: dict) -> dict[str, str]:
        folders = {}
        for role in ("teacher", "student"):
            folder = tmp_path / role
            shutil.copytree(PAIR / role, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | changes.get(role, {})))
            folders[role] = str(folder)
        return folders

    return make


SIZES = dict(top_k=3, teacher_top_k=8, max_len=176, draft_len=2, tensor_parallel=1)


def test_fitting_pair_gives_the_students_tokenizer(pair) -> None:
    tokenizer = check_pair(**pair(), **SIZES)
    assert tokenizer.decode(tokenizer("tom has 3 coins").input_ids) == "tom has 3 coins"


@pytest.mark.parametrize(
    ("option", "value"), [("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("logit_scale", 0.0625)]
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_logits_that_are_more_than_a_product_are_refused(pair, role: str, option: str, value: float) -> None:
    model = pair(**{role: {option: value}})[role]
    with pytest.raises(RecipeError, match=rf"the {role} .*{option} = {value}.* use skd\.loss\.vocabulary=top_k"):
        check_output_head(model, role)


@pytest.mark.parametrize(("option", "value"), [("final_logit_softcapping", None), ("logits_scaling", 1.0)])
def test_options_that_leave_the_logits_alone_are_accepted(pair, option: str, value: float | None) -> None:
    check_output_head(pair(teacher={option: value})["teacher"], "teacher")


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "fits"), [(2, 4, 4, True), (4, 8, 2, True), (2, 5, 5, False), (4, 20, 10, False)]
)
def test_heads_are_shared_out_evenly(pair, ranks: int, heads: int, kv_heads: int, fits: bool) -> None:
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    folders = pair(teacher={"num_attention_heads": 8, "num_key_value_heads": 8}, student=changes)
    if fits:
        check_pair(**folders, **SIZES | {"tensor_parallel": ranks})
        return
    with pytest.raises(
        RecipeError, match=f"size is {ranks}, but the student has {heads} attention heads and {kv_heads} of"
    ):
        check_pair(**folders, **SIZES | {"tensor_parallel": ranks})


ROUNDED = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}


def test_only_a_teacher_may_be_rounded(pair) -> None:
    folders = pair(teacher=ROUNDED, student=ROUNDED)
    check_pair(**folders, **SIZES)
    with pytest.raises(RecipeError, match=r"the student '.*' has rounded weights \(gptq\), which cannot be trained"):
        check_full_weights(folders["student"])
    check_full_weights(str(PAIR / "student"))


@pytest.mark.parametrize(
    ("stored", "found"), [("BF16", None), ("I8", "is stored as I8"), (None, "is not stored under its own name")]
)
def test_a_rounded_head_is_refused_by_the_loss_over_all_tokens(pair, stored: str | None, found: str | None) -> None:
    folder = pair(teacher=ROUNDED | {"tie_word_embeddings": False})["teacher"]
    dtypes = {"BF16": torch.bfloat16, "I8": torch.int8}
    tensors = {"other": torch.zeros(1)} | (
        {"lm_head.weight": torch.zeros(2, 2, dtype=dtypes[stored])} if stored else {}
    )
    save_file(tensors, Path(folder) / "model.safetensors")
    if found is None:
        check_output_head(folder, "teacher")
        return
    with pytest.raises(RecipeError, match=f"the output head of the teacher .* {found}, rounded; use"):
        check_output_head(folder, "teacher")


def test_a_ring_needs_a_gpu_and_a_student_whose_head_can_be_read(pair) -> None:
    check_ring(pair()["student"], 2, cpu=False)
    with pytest.raises(RecipeError, match=r"ring_attn_size is 2, but ring attention is made of flash-attn's kernels"):
        check_ring("no model is looked at", 2, cpu=True)


def test_a_ring_of_a_student_with_a_soft_cap_is_refused(pair) -> None:
    student = pair(student={"final_logit_softcapping": 30.0})["student"]
    with pytest.raises(RecipeError, match=r"ring_attn_size is 2, but the student .*final_logit_softcapping = 30.0"):
        check_ring(student, 2, cpu=False)


def test_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    from transformers import PhiConfig

    PhiConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
              num_attention_heads=2).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(RecipeError, match=r"the teacher .* has an output head with a bias"):
        check_output_head(str(tmp_path), "teacher")


def test_different_vocabularies_name_tokens() -> None:
    with pytest.raises(
        RecipeError, match=r"2 tokens differ, e\.g\. 'b' \(teacher 1, student 2\), 'c' \(teacher 2, stud"
    ):
        check_vocabularies({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1})
    with pytest.raises(RecipeError, match=r"1 tokens differ, e\.g\. 'b' \(teacher 1, student -\)"):
        check_vocabularies({"a": 0, "b": 1}, {"a": 0})
    check_vocabularies({"a": 0}, {"a": 0})


def test_pair_with_different_vocabularies(pair) -> None:
    folders = pair()
    path = Path(folders["student"], "tokenizer.json")
    path.write_text(path.read_text().replace('" coins"', '" moins"'))
    with pytest.raises(RecipeError, match=r"different vocabularies: 2 tokens differ, e\.g\. ' coins'"):
        check_pair(**folders, **SIZES)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_padding_rows_may_differ(pair, role: str) -> None:
    """The tokenizers agree, so what one model has more is padding; K is limited by what both have."""
    rows = json.loads((PAIR / "teacher" / "config.json").read_text())["vocab_size"]
    folders = pair(**{role: {"vocab_size": rows + 64}})
    check_pair(**folders, **SIZES | {"top_k": rows, "teacher_top_k": rows})
    with pytest.raises(RecipeError, match=f"top_k is {rows + 1}, but the vocabulary has {rows} tokens"):
        check_pair(**folders, **SIZES | {"top_k": rows + 1})
    assert common_vocab_size(**folders) == rows


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_token_without_an_output_row(pair, role: str) -> None:
    with pytest.raises(
        RecipeError, match=f"the tokenizer has the token id .*, but the {role} has 100 output rows only"
    ):
        check_pair(**pair(**{role: {"vocab_size": 100}}), **SIZES | {"top_k": 1, "teacher_top_k": 1})


@pytest.mark.parametrize("key", ["top_k", "teacher_top_k"])
def test_k_beyond_the_vocabulary(pair, key: str) -> None:
    rows = json.loads((PAIR / "teacher" / "config.json").read_text())["vocab_size"]
    folders = pair()
    check_pair(**folders, **SIZES | {key: rows})
    option = {"top_k": r"skd\.rollout\.top_k", "teacher_top_k": r"skd\.loss\.teacher_top_k"}[key]
    with pytest.raises(RecipeError, match=f"{option} is {rows + 1}, but the vocabulary has {rows} tokens"):
        check_pair(**folders, **SIZES | {key: rows + 1})


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_context_that_is_too_short(pair, role: str) -> None:
    """176 tokens and two drafts need 181 positions."""
    check_pair(**pair(**{role: {"max_position_embeddings": 181}}), **SIZES)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_context_that_is_one_too_short(pair, role: str) -> None:
    message = rf"data\.max_len = 176 needs a context of 181 .* but the {role} has 180; lower data\.max_len to 175"
    with pytest.raises(RecipeError, match=message):
        check_pair(**pair(**{role: {"max_position_embeddings": 180}}), **SIZES)


def test_model_that_is_not_there(tmp_path: Path) -> None:
    for role, pair in (("teacher", ("/no/such", PAIR / "student")), ("student", (PAIR / "teacher", "/no/such"))):
        with pytest.raises(RecipeError, match=f"the {role} '/no/such' is not there"):
            check_pair(*map(str, pair), **SIZES)
    with pytest.raises(RecipeError, match=r"the teacher .* cannot be loaded"):
        check_pair(str(tmp_path), str(PAIR / "student"), **SIZES)


def test_experts_want_experts_above_them() -> None:
    """vLLM makes a group for the experts of the engine's model alone."""
    from transformers import LlamaConfig, MixtralConfig

    dense, experts = LlamaConfig(), MixtralConfig()
    for teacher, student in ((dense, dense), (experts, dense), (experts, experts)):
        check_experts_beside({"teacher": teacher, "student": student})
    with pytest.raises(RecipeError, match="the student is a mixture of experts and the teacher is not"):
        check_experts_beside({"teacher": dense, "student": experts})


def test_a_student_with_experts_is_refused_on_a_cpu_and_in_parts(tmp_path: Path) -> None:
    from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    LlamaConfig(**small).save_pretrained(tmp_path / "dense")
    check_experts(str(tmp_path / "dense"))
    check_layers_to_spread(str(tmp_path / "dense"), 2)
    for kind in (MixtralConfig, Qwen3MoeConfig):
        kind(**small).save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(RecipeError, match="is a mixture of experts, which on a CPU does not take new weights"):
            check_experts(str(tmp_path / kind.__name__))
        with pytest.raises(
            RecipeError, match=r"tensor_parallel_size is 2, but the student .* is a mixture of experts"
        ):
            check_layers_to_spread(str(tmp_path / kind.__name__), 2)
