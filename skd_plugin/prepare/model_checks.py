"""Checks of the two models against each other and against the recipe; reads configurations and tokenizers only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from skd_plugin import adapters, trust
from skd_plugin.config.context import context_needed
from skd_plugin.errors import RecipeError
from skd_plugin.models import (
    attention_window,
    changed_logits,
    load_model_config,
    load_tokenizer,
    output_head_names,
    output_head_type,
    without_weights,
)
from skd_plugin.quantization import method_of


def check_pair(
    teacher: str,
    student: str,
    *,
    top_k: int,
    teacher_top_k: int,
    max_len: int,
    draft_len: int,
    tensor_parallel: int,
    engine_len: int = 0,
    own_prompts: bool = False,
    served: bool = False,
) -> Any:
    """Returns the student's tokenizer.

    Args:
        engine_len: of the engine's longest sequence, where that is more than `max_len`.
        own_prompts: of the teacher, so that the student stands at other places than the teacher.
        served: the teacher is elsewhere, and the engine has the student alone.

    Raises:
        RecipeError: a token differs, K is outside 1..|V| (the ids that both models have), a context is too short, or
            a model cannot be split over the ranks of an engine.
    """
    if teacher != student:  # a student alone stands in both places
        adapters.refuse_adapter(teacher, "teacher")
    adapters.check_folder(student, "student")
    for role, name in (("student", student),) if served else (("teacher", teacher), ("student", student)):
        trust.refuse_pickles(adapters.base_of(name) or name, role)
    configs = {"teacher": load_model_config(teacher, "teacher"), "student": load_model_config(student, "student")}
    if served:
        check_heads({"student": configs["student"]}, tensor_parallel)
    else:
        check_attention(configs, own_prompts=own_prompts)
        check_heads(configs, tensor_parallel)
        check_experts_beside(configs)
    tokenizers = {"teacher": load_tokenizer(teacher, "teacher"), "student": load_tokenizer(student, "student")}
    check_vocabularies(tokenizers["teacher"].get_vocab(), tokenizers["student"].get_vocab())
    sizes = {role: config.get_text_config().vocab_size for role, config in configs.items()}
    vocab_size = min(sizes.values())  # see common_vocab_size
    last = max(tokenizers["student"].get_vocab().values())
    if last >= vocab_size:
        smaller = min(sizes, key=lambda role: sizes[role])
        raise RecipeError(
            f"the tokenizer has the token id {last}, but the {smaller} has {vocab_size} output rows only; its "
            "embedding was not made for this tokenizer"
        )
    for key, value in (("skd.rollout.top_k", top_k), ("skd.loss.teacher_top_k", teacher_top_k)):
        if value > vocab_size:
            raise RecipeError(f"{key} is {value}, but the vocabulary has {vocab_size} tokens; use 1..{vocab_size}")
    for role, config in configs.items():
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max_len if served and role == "student" else max(max_len, engine_len)
        needed = context_needed(longest, draft_len)
        if context is not None and needed > context:
            if longest > max_len:
                raise RecipeError(
                    f"skd.teacher.prompt.max_len and the longest response need a context of {needed} tokens (2 x "
                    f"draft_len + 1 more), but the {role} has {context}; lower it by {needed - context}"
                )
            raise RecipeError(
                f"openrlhf.data.max_len = {max_len} needs a context of {needed} tokens (2 x draft_len + 1 more), but "
                f"the {role} has {context}; lower data.max_len to {context + max_len - needed}"
            )
    return tokenizers["student"]


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_experts(student: str) -> None:
    """Raises RecipeError for a student with experts that is to be trained on a CPU: vLLM packs them there when it
    loads them, and new weights would be written where nothing reads them.
    """
    if _has_experts(load_model_config(student, "student")):
        raise RecipeError(
            f"the student '{student}' is a mixture of experts, which on a CPU does not take new weights in the "
            "engine; train it on a GPU, or take a dense student"
        )


def check_layers_to_spread(student: str, ranks: int) -> None:
    """Raises RecipeError for a student whose layers nobody has seen right on several ranks (DeepSpeed's AutoTP)."""
    config = load_model_config(student, "student")
    if _has_experts(config):
        raise RecipeError(
            f"openrlhf.ds.tensor_parallel_size is {ranks}, but the student '{student}' is a mixture of experts, whose "
            "layers have not been compared with those on one rank; set it to 1"
        )


def check_full_weights(student: str) -> None:
    """Raises RecipeError for a student whose weights are rounded: it could not be trained."""
    method = method_of(load_model_config(student, "student"))
    if method is not None:
        raise RecipeError(
            f"the student '{student}' has rounded weights ({method}), which cannot be trained; only a teacher may "
            "have them. Take the checkpoint that it was made of"
        )


def check_heads(configs: Mapping[str, Any], tensor_parallel: int) -> None:
    """vLLM gives each rank of an engine the same number of heads, of the teacher and of the student; key-value heads
    that are fewer than ranks it copies.

    Raises:
        RecipeError: they cannot be dealt out so.
    """
    if tensor_parallel == 1:
        return
    for role, config in configs.items():
        text = config.get_text_config()
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
            raise RecipeError(
                f"openrlhf.vllm.tensor_parallel_size is {tensor_parallel}, but the {role} has {heads} attention heads "
                f"and {kv_heads} of keys and values, which cannot be shared out evenly: both models are split over "
                "the GPUs of an engine. Take a number that divides the heads of both"
            )


def _has_experts(config: Any) -> bool:
    return any((getattr(config.get_text_config(), name, None) or 0) > 1 for name in EXPERTS)


def check_experts_beside(configs: Mapping[str, Any]) -> None:
    """Raises RecipeError for a student with experts under a teacher without: vLLM makes the group of processes that
    experts work in for the engine's model, and its draft model finds none.
    """
    if _has_experts(configs["student"]) and not _has_experts(configs["teacher"]):
        raise RecipeError(
            "the student is a mixture of experts and the teacher is not, which vLLM cannot hold in one engine; take a "
            "teacher that is one, too, or a dense student"
        )


def check_adapters(student: str, lora: adapters.LoraOptions) -> None:
    """Raises RecipeError for adapters that cannot be merged into the weights that the engine gets."""
    config = load_model_config(student, "student")
    if _has_experts(config):
        raise RecipeError(
            f"the student '{student}' is a mixture of experts, whose adapters are not merged into the experts of the "
            "engine; set openrlhf.ds.lora.rank=0, or take a dense student"
        )
    model = without_weights(config)
    modules = [name for name, _ in model.named_modules()]
    option = "openrlhf.ds.lora.target_modules"
    for target in lora.target_modules if isinstance(lora.target_modules, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            linear = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
            raise RecipeError(
                f"{option} names '{target}', but the student '{student}' has no such module; its linear layers are "
                f"{', '.join(linear)}"
            )
    model.tie_weights()
    shared = {id(model.get_input_embeddings().weight)}
    with warnings.catch_warnings(action="ignore"):  # what peft would say of such layers is said here
        adapted = adapters.with_adapters(model, lora)
    for name, layer in adapters.adapted_layers(adapted):
        base = layer.get_base_layer()
        if not _is_linear(base):
            raise RecipeError(f"{option} reaches {name}, a {type(base).__name__}; only linear layers can be merged")
        if id(base.weight) in shared:
            raise RecipeError(
                f"{option} reaches {name}, whose weight is the input embedding's, too (tie_word_embeddings); an "
                "adapter would untie them, and the engine has one weight for both. Leave it out"
            )


def _is_linear(module: Any) -> bool:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Linear | Conv1D)


def check_attention(configs: Mapping[str, Any], *, own_prompts: bool = False) -> None:
    """One engine holds the layers of both models in one group of caches, which knows full attention and windows of one
    size, in any mixture.

    Args:
        configs: transformers' configurations by the role of the model.

    Raises:
        RecipeError: there are windows of two sizes, or layers of another kind; with `own_prompts` of the teacher, both
            models have windows alone.
    """
    windows: dict[int, str] = {}
    windows_alone: list[bool] = []
    for role, config in configs.items():
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        others = kinds - {"full_attention", "sliding_attention"}
        if others:
            raise RecipeError(
                f"the {role} has layers of {', '.join(sorted(others))}, which an SKD engine cannot hold beside those "
                "of another model; take a model with full or sliding-window attention"
            )
        window = attention_window(config)
        if window:
            windows[window] = role
        windows_alone.append(bool(window) and kinds <= {"sliding_attention"})
    if own_prompts and all(windows_alone):
        raise RecipeError(
            "with a prompt of the teacher's own the student stands some places before it, and where all layers of "
            "both models have a window, vLLM drops what the student still sees; take a pair of which one has full "
            "attention"
        )
    if len(windows) > 1:
        raise RecipeError(
            "one engine cannot hold attention windows of two sizes: "
            + ", ".join(f"the {role}'s is {window} tokens" for window, role in windows.items())
            + "; take a pair with the same window, or one of them without"
        )


FULL_TYPES = ("F32", "F16", "BF16")  # of safetensors


def check_output_head(name: str, role: str) -> None:
    """Raises RecipeError for a model whose logits are not just its output head times its last hidden state."""
    change = changed_logits(load_model_config(name, role))
    if change is not None:
        raise RecipeError(
            f"skd.loss.vocabulary=full: the {role} '{name}' transforms the product of its output head ({change}), "
            "which this loss does not follow; use skd.loss.vocabulary=top_k with this model"
        )
    output_head_names(name, role)
    if method_of(load_model_config(name, role)) is None:
        return
    stored = output_head_type(name)
    if stored not in FULL_TYPES:
        found = f"is stored as {stored}" if stored else "is not stored under its own name"
        raise RecipeError(
            f"skd.loss.vocabulary=full: the output head of the {role} '{name}' {found}, rounded; use "
            "skd.loss.vocabulary=top_k, or a checkpoint whose head was left full"
        )


def check_ring(student: str, ring: int, *, cpu: bool) -> None:
    """Raises RecipeError where ring attention has no kernels, or the student's head cannot be read on each rank."""
    name = f"openrlhf.ds.ring_attn_size is {ring}"
    if cpu:
        raise RecipeError(f"{name}, but ring attention is made of flash-attn's kernels, which need a GPU; set it to 1")
    change = changed_logits(load_model_config(student, "student"))
    if change is not None:
        raise RecipeError(
            f"{name}, but the student '{student}' transforms the product of its output head ({change}), which the "
            "loss of tokens on several ranks does not follow; set it to 1"
        )


def check_vocabularies(teacher: dict[str, int], student: dict[str, int]) -> None:
    """Raises RecipeError naming tokens that differ: an id must mean the same token in both models."""
    if teacher == student:
        return
    differing = sorted(t for t in teacher.keys() | student.keys() if teacher.get(t) != student.get(t))
    shown = ", ".join(f"{t!r} (teacher {teacher.get(t, '-')}, student {student.get(t, '-')})" for t in differing[:5])
    raise RecipeError(
        f"teacher and student have different vocabularies: {len(differing)} tokens differ, e.g. {shown}. SKD compares "
        "the two models token by token; choose models of one family."
    )
