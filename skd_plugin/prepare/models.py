"""Checks of the two models against each other and against the recipe; reads configurations and tokenizers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skd_plugin.errors import RecipeError


def load_tokenizer(name: str, role: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the {role}'s tokenizer cannot be loaded from '{name}': {_first_line(error)}") from error


def load_model_config(name: str, role: str) -> Any:
    from transformers import AutoConfig

    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise RecipeError(f"the {role} '{name}' is not there; give a folder with a model, or a Hugging Face name")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the {role} '{name}' cannot be loaded: {_first_line(error)}") from error


def check_pair(teacher: str, student: str, *, top_k: int, loss_top_k: int, max_len: int, draft_len: int) -> Any:
    """Returns the student's tokenizer.

    Raises:
        RecipeError: a token differs, K is outside 1..|V| (the ids that both models have), or a context is too short.
    """
    configs = {"teacher": load_model_config(teacher, "teacher"), "student": load_model_config(student, "student")}
    tokenizers = {"teacher": load_tokenizer(teacher, "teacher"), "student": load_tokenizer(student, "student")}
    check_vocabularies(tokenizers["teacher"].get_vocab(), tokenizers["student"].get_vocab())
    sizes = {role: config.get_text_config().vocab_size for role, config in configs.items()}
    vocab_size = min(sizes.values())  # see common_vocab_size
    last = max(tokenizers["student"].get_vocab().values())
    if last >= vocab_size:
        smaller = min(sizes, key=sizes.get)
        raise RecipeError(
            f"the tokenizer has the token id {last}, but the {smaller} has {vocab_size} output rows only; its "
            "embedding was not made for this tokenizer"
        )
    for key, value in (("skd.rollout.top_k", top_k), ("skd.loss.top_k", loss_top_k)):
        if value > vocab_size:
            raise RecipeError(f"{key} is {value}, but the vocabulary has {vocab_size} tokens; use 1..{vocab_size}")
    for role, config in configs.items():
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        needed = context_needed(max_len, draft_len)
        if context is not None and needed > context:
            raise RecipeError(
                f"openrlhf.data.max_len = {max_len} needs a context of {needed} tokens (2 x draft_len + 1 more), but "
                f"the {role} has {context}; lower data.max_len to {context + max_len - needed}"
            )
    return tokenizers["student"]


def common_vocab_size(teacher: str, student: str) -> int:
    """Ids that both models have an output row for. What one of them has beyond is padding, where no token is."""
    configs = load_model_config(teacher, "teacher"), load_model_config(student, "student")
    return min(config.get_text_config().vocab_size for config in configs)


# Options of transformers' models that change the logits behind the output head, and the values at which they do not.
TRANSFORMED_LOGITS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None, 0),  # Gemma 2 and later
    "logits_soft_cap": (None, 0),
    "logits_scaling": (None, 1),  # Granite
    "logit_scale": (None, 1),  # Cohere
    "lm_head_multiplier": (None, 1),  # Falcon-H1
    "output_multiplier": (None, 1),
    "mup_width_multiplier": (None, 1),  # Phi-3-small
    "dim_model_base": (None,),  # MiniCPM divides its last hidden state by a ratio of it
}


def check_output_head(name: str, role: str) -> None:
    """Raises RecipeError for a model whose logits are not just its output head times its last hidden state."""
    config = load_model_config(name, role).get_text_config()
    for option, neutral in TRANSFORMED_LOGITS.items():
        value = getattr(config, option, None)
        if value not in neutral:
            raise RecipeError(
                f"skd.loss.vocabulary=full: the {role} '{name}' transforms the product of its output head ({option} = "
                f"{value}), which this loss does not follow; use skd.loss.vocabulary=top_k with this model"
            )
    output_head_names(name, role)


def output_head_names(name: str, role: str) -> list[str]:
    """Names under which a checkpoint may hold the weight of the model's output head; a tied one is the embedding's.

    Raises:
        RecipeError: the model has no output head that transformers knows, or one with a bias.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(name, role), trust_remote_code=True)
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        found = "has no output head that transformers names" if head is None else "has an output head with a bias"
        raise RecipeError(f"skd.loss.vocabulary=full: the {role} '{name}' {found}; use skd.loss.vocabulary=top_k")
    model.tie_weights()
    return [key for key, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight]


def context_needed(max_len: int, draft_len: int) -> int:
    """Tokens of context that the engine needs for sequences of `max_len`.

    vLLM counts the drafts of a step and those it will ask for next, and stops drafting for the whole batch where they
    would not fit.
    """
    return max_len + 2 * draft_len + 1


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


def host_prompts(rows: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any) -> list[str]:
    """Prompts of a dataset's rows, in the form that the host gives them."""
    from openrlhf.datasets.prompts_dataset import preprocess_data

    chat = tokenizer.apply_chat_template if options["data.apply_chat_template"] else None
    template, key = options["data.input_template"], options["data.input_key"]
    return [preprocess_data(row, template, key, apply_chat_template=chat)[0] for row in rows]


def check_prompts(prompts: list[str], tokenizer: Any, max_prompt_len: int) -> None:
    """Raises RecipeError for the first prompt that the host would cut or SKD could not start from."""
    for number, prompt in enumerate(prompts, start=1):
        length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        if not 2 <= length <= max_prompt_len:
            raise RecipeError(
                f"prompt {number} has {length} tokens, but 2 to {max_prompt_len} fit (openrlhf.data.max_len minus "
                f"skd.rollout.max_new_tokens): {prompt[:60]!r}..."
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
