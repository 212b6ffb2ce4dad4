"""LoRA adapters: a merged weight is the adapted layer; what cannot be merged is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from skd_plugin.adapters import (
    LoraOptions,
    base_of,
    check_folder,
    merge,
    refuse_adapter,
    weights,
    whole,
    with_adapters,
)
from skd_plugin.config.host_options import host_parser
from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import load_run
from skd_plugin.prepare.model_checks import check_adapters
from tests.recipes import PAIR, QUICKSTART

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "gemma 3": transformers.Gemma3TextConfig(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "gpt neox": transformers.GPTNeoXConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                           num_attention_heads=4, max_position_embeddings=64),
    "gpt 2": transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip
LORA = LoraOptions(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
HEAD = LORA._replace(target_modules=["q_proj", "down_proj", "lm_head"])


@pytest.fixture(scope="session", autouse=True)
def importable_host() -> None:
    from skd_plugin.host import on_cpu

    on_cpu.install()


def student(family: str, folder: Path, lora: LoraOptions = LORA, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the family, saved in the folder, and its adapters, which are not zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    model.save_pretrained(folder)
    adapted = with_adapters(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), lora)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return adapted


def received(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the engines get."""
    from skd_plugin.host import weight_sync

    return {
        name: tensor
        for bucket, named in weight_sync.buckets(model)
        for name, tensor in bucket.unpack(weight_sync.flatten(model, named))
    }


@pytest.mark.parametrize(("family", "lora"), [*((family, LORA) for family in FAMILIES), ("llama", HEAD)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft's, of GPT-2
def test_merged_weights_are_the_adapted_model(family: str, lora: LoraOptions, tmp_path, monkeypatch):
    """Names and shapes of the base's checkpoint; the logits of a model loaded from them are the adapted model's."""
    from skd_plugin.host import weight_sync

    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", 1 << 14)
    adapted = student(family, tmp_path, lora)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    ids = torch.randint(3, 60, (2, 11))
    with torch.no_grad():
        wanted, without = adapted(ids).logits, plain_logits(tmp_path, ids)
    base, found = load_file(tmp_path / "model.safetensors"), received(adapted)
    assert found.keys() == base.keys()
    assert all(found[name].shape == base[name].shape for name in base)
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(plain_logits(tmp_path, ids), wanted, atol=1e-5, rtol=1e-5)
    assert (without - wanted).abs().max() > 0.1, "the adapters do nothing"
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.named_parameters())


@torch.no_grad()
def plain_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


@pytest.mark.parametrize("family", ["llama, tied", "qwen3"])
def test_an_adapters_folder_is_made_whole(family: str, tmp_path: Path) -> None:
    """As OpenRLHF saves it, or with a pickle of tensors, as at ZeRO-3."""
    base, folder, into = tmp_path / "base", tmp_path / "adapter", tmp_path / "whole"
    adapted = student(family, base)
    adapted.save_pretrained(folder)
    ids = torch.randint(3, 60, (2, 11))
    with torch.no_grad():
        wanted = adapted(ids).logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(PAIR / "student")
    tokenizer.save_pretrained(base)
    assert base_of(str(folder)) == str(base) and base_of(str(base)) is None
    assert whole(str(base), into, "float32") == str(base) and not into.exists()
    for form in ("safetensors", "bin"):
        assert whole(str(folder), into / form, "float32") == str(into / form)
        torch.testing.assert_close(plain_logits(into / form, ids), wanted, atol=1e-5, rtol=1e-5)
        assert transformers.AutoTokenizer.from_pretrained(into / form).get_vocab() == tokenizer.get_vocab()
        if form == "safetensors":
            torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
            (folder / "adapter_model.safetensors").unlink()


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    """The sum is made in float32: many small parts of an adapter in bfloat16 add up before they are rounded."""
    adapted = student("llama", tmp_path, dtype=torch.bfloat16)
    for name, weight in weights(adapted):
        assert weight.merged().dtype == torch.bfloat16
        if weight.adapter is not None:
            layer = adapted.get_base_model().get_submodule(name.removesuffix(".weight"))
            a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
            exact = weight.base.double() + 2 * b @ a
            nearest = (weight.merged().double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9
            assert nearest.all(), name


def test_a_folder_that_is_no_adapter_of_ours(tmp_path: Path) -> None:
    settings = tmp_path / "adapter_config.json"
    for content, message in [
        ("{", "does not name its model"),
        ("{}", "does not name its model"),
        ('{"base_model_name_or_path": ""}', "has base_model_name_or_path '', but must name a model"),
    ]:
        settings.write_text(content)
        with pytest.raises(RecipeError, match=message):
            base_of(str(tmp_path))
    settings.write_text('{"base_model_name_or_path": "./no/such"}')
    with pytest.raises(RecipeError, match=r"the adapter's base './no/such' is not there"):
        merge(str(tmp_path), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"LoRA adapter without config\.json and tokenizer_config\.json; merge it"):
        check_folder(str(tmp_path), "student")
    with pytest.raises(RecipeError, match=r"the teacher .* is a LoRA adapter of './no/such', .*merge_adapter\.py"):
        refuse_adapter(str(tmp_path), "teacher")
    with pytest.raises(RecipeError, match="is no adapter: it has no adapter_config"):
        merge(str(PAIR / "student"), tmp_path / "out")


def test_other_adapters_are_not_sent(tmp_path: Path) -> None:
    """A layer that peft wraps in another way is an error, and no weight without its adapter."""
    adapted = student("llama", tmp_path, LORA._replace(target_modules=["embed_tokens"]))
    with pytest.raises(RuntimeError, match=r"^Embedding: only LoRA beside a linear layer can be merged"):
        received(adapted)


# --- what a recipe may ask for ---


@pytest.fixture
def model(tmp_path: Path):
    def make(config: Any) -> str:
        config.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_a_family(family: str, model) -> None:
    check_adapters(model(FAMILIES[family]), LORA)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_proj", "qproj"], r"names 'qproj', .*; its linear layers are down_proj, gate_proj, .*, v_proj$"),
        ("llama", ["embed_tokens"], r"target_modules reaches model\.embed_tokens, a Embedding; only linear layers"),
        ("llama, tied", ["lm_head"], r"reaches lm_head, whose weight is the input embedding's, too"),
    ],
)
def test_layers_that_cannot_be_merged(family: str, targets: list[str], message: str, model) -> None:
    with pytest.raises(RecipeError, match=message):
        check_adapters(model(FAMILIES[family]), LORA._replace(target_modules=targets))


def test_adapters_of_experts_are_refused(model) -> None:
    experts = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    with pytest.raises(RecipeError, match=r"mixture of experts, whose adapters .* set openrlhf\.ds\.lora\.rank=0"):
        check_adapters(model(experts), LORA)


def test_a_recipe_with_adapters(tmp_path: Path) -> None:
    """peft knows `all-linear` as a word, OpenRLHF's parser makes a list of it."""

    def load(*overrides: str) -> Any:
        few = ["skd.task.train_prompts=64", "skd.task.eval_prompts=2"]
        return load_run(QUICKSTART, [f"skd.run_dir={tmp_path / 'run'}", *few, *overrides])

    for targets, found in [("all-linear", "all-linear"), ("[q_proj,v_proj]", ["q_proj", "v_proj"])]:
        run = load("openrlhf.ds.lora.rank=4", f"openrlhf.ds.lora.target_modules={targets}")
        parsed = vars(host_parser().parse_args(run.host_argv()))
        assert (parsed["ds.lora.rank"], parsed["ds.lora.target_modules"]) == (4, found)
    with pytest.raises(RecipeError, match="names 'no_proj', but the student"):
        load("openrlhf.ds.lora.rank=4", "openrlhf.ds.lora.target_modules=[no_proj]")
    student("llama", tmp_path / "base").save_pretrained(tmp_path / "adapter")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PAIR / "student" / name, tmp_path / "adapter")
    with pytest.raises(RecipeError, match=r"the student .*adapter' is a LoRA adapter of .*merge_adapter\.py"):
        load(f"openrlhf.actor.model_name_or_path={tmp_path / 'adapter'}")
    with pytest.raises(RecipeError, match=r"the teacher .*adapter' is a LoRA adapter of .*merge_adapter\.py"):
        load(f"skd.teacher.model_name_or_path={tmp_path / 'adapter'}")
