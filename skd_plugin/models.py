"""What is read of a model beside its weights: configuration, tokenizer, end tokens, output head."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from skd_plugin import trust
from skd_plugin.errors import RecipeError
from skd_plugin.words import first_line


def load_tokenizer(name: str, role: str) -> Any:
    from transformers import AutoTokenizer

    trust.refuse_code(name, role)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust.may_run_code())
    except (OSError, ValueError) as error:
        raise RecipeError(f"the {role}'s tokenizer cannot be loaded from '{name}': {first_line(error)}") from error


def end_tokens(tokenizer: Any) -> list[int]:
    """The end token that a tokenizer knows, if it knows one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def engine_end_ids(model: str, *tokenizers: Any) -> frozenset[int]:
    """Tokens at which vLLM ends a response of an engine with this model.

    Args:
        tokenizers: the model's own, and those of which the end token counts too.
    """
    listed = load_model_config(model, "engine").get_text_config().eos_token_id  # vLLM reads it where nothing else says
    of_tokenizers = (token for tokenizer in tokenizers for token in end_tokens(tokenizer))
    return generation_end_ids(model) | frozenset([*of_tokenizers, *_listed(listed)])


def joined_ends(teacher: str, student: str) -> tuple[int, ...]:
    """Tokens that end a turn for either model, where the two do not end alike; first the one that stands for all, at
    which an engine of the two stops: the student's tokenizer's, or else the teacher's. Empty: nothing is to be joined.
    """
    models = (student, "student"), (teacher, "teacher")
    first = [end_tokens(load_tokenizer(*model)) for model in models]
    ends = [frozenset([*own, *_listed_ends(*model)]) for own, model in zip(first, models, strict=True)]
    own = [token for tokens in first for token in tokens]
    if not own or (first[0] == first[1] and ends[0] == ends[1]):
        return ()
    vocab = common_vocab_size(teacher, student)
    others = sorted(token for token in ends[0] | ends[1] if token != own[0] and token < vocab)
    return (own[0], *others) if others else ()


def _listed_ends(name: str, role: str) -> list[int]:
    """End tokens of generation_config.json, or of config.json where there is none."""
    from transformers import GenerationConfig

    try:
        return _listed(GenerationConfig.from_pretrained(name).eos_token_id)
    except OSError:  # a model need not have one
        return _listed(load_model_config(name, role).get_text_config().eos_token_id)


def joined_ends_words(tokenizer: Any, end_ids: Sequence[int]) -> str | None:
    """What is joined, for people; None: nothing."""
    if not end_ids:
        return None
    names = [f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in end_ids]
    return f"{' and '.join(names)} end a turn in one of the models; they are one event, written as {names[0]}"


def response_text(tokenizer: Any, ids: Sequence[int], end_ids: Collection[int]) -> str:
    """A response as checkers and people read it, everywhere: its ids decoded by themselves, without the token that
    ended it and without special tokens. Decoded with its prompt and cut off again it may be another text.
    """
    ids = list(ids)
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in end_ids else ids, skip_special_tokens=True)


def load_model_config(name: str, role: str) -> Any:
    from transformers import AutoConfig

    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise RecipeError(f"the {role} '{name}' is not there; give a folder with a model, or a Hugging Face name")
    trust.refuse_code(name, role)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust.may_run_code())
    except (OSError, ValueError) as error:
        raise RecipeError(f"the {role} '{name}' cannot be loaded: {first_line(error)}") from error


def without_weights(config: Any) -> Any:
    """A model of this configuration on the meta device, where it takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust.may_run_code())


def attention_window(config: Any) -> int | None:
    """Tokens that the layers with a window see; None where no layer has one, whatever the configuration names."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    return getattr(text, "sliding_window", None) or None if slides else None


def count_parameters(config: Any) -> int:
    """Of a model by its configuration; a tied one counts once."""
    return sum(parameter.numel() for parameter in without_weights(config).parameters())  # yields a tied one once


FLOAT32_TOLERANCE = 0.01  # nats, mean over the tokens of a micro-batch; 1e-5 is usual
HALF_TOLERANCE = 0.25  # logits are rounded to about 0.1


def mean_tolerance(dtype: torch.dtype | str) -> float:
    """Nats a token, in the mean, by which rounding alone moves log-probs between vLLM and transformers."""
    return FLOAT32_TOLERANCE if dtype in (torch.float32, "float32") else HALF_TOLERANCE


def load_causal_model(name: str, dtype: torch.dtype, **placement: Any) -> Any:
    """A model as transformers reads it, for a comparison with what the engine made of the same files."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=trust.may_run_code(), **placement
    ).eval()


@torch.no_grad()
def response_logits(model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    """Float32 [R, V]: row t is what the model says after the prompt and t response tokens; R may be 0."""
    ids = torch.tensor([[*prompt_ids, *response_ids]], device=model.device)
    return model(ids).logits[0, len(prompt_ids) - 1 : -1].float().cpu()


def generation_end_ids(name: str) -> frozenset[int]:
    """End tokens of the model's generation_config.json; empty where it has none."""
    from transformers import GenerationConfig

    try:
        end = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        return frozenset()  # a model need not have one
    return frozenset(_listed(end))


def _listed(end: int | list[int] | None) -> list[int]:
    return [] if end is None else [end] if isinstance(end, int) else end


def check_saving(name: str, role: str) -> None:
    """Writes the model's settings and tokenizer into a folder that is thrown away, as its last save will write them.

    Raises:
        RecipeError: transformers refuses them, as it does a generation_config.json that contradicts itself, which it
            has read without a word, or a chat template whose name is no file's.
    """
    from transformers import GenerationConfig

    config, tokenizer = load_model_config(name, role), load_tokenizer(name, role)
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # a model need not have one
        generation = GenerationConfig()
    with TemporaryDirectory(prefix="skd-save-") as folder:
        files = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer}
        for file, settings in files.items():
            try:
                settings.save_pretrained(folder)
            except (ValueError, TypeError, OSError, NotImplementedError) as error:
                reason = " ".join(str(error).split())
                raise RecipeError(
                    f"the {role} '{name}' could not be saved at the end of the run; mend its {file}: {reason}"
                ) from error


def common_vocab_size(teacher: str, student: str) -> int:
    """Ids that both models have an output row for. What one of them has beyond is padding, where no token is."""
    configs = load_model_config(teacher, "teacher"), load_model_config(student, "student")
    return min(config.get_text_config().vocab_size for config in configs)


# Options of transformers' models that change the logits beside the output head, and the values at which they do not.
CHANGED_LOGITS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None, 0),  # Gemma 2 and later
    "logits_soft_cap": (None, 0),
    "logits_scaling": (None, 1),  # Granite
    "logit_scale": (None, 1),  # Cohere
    "lm_head_multiplier": (None, 1),  # Falcon-H1
    "output_multiplier": (None, 1),
    "mup_width_multiplier": (None, 1),  # Phi-3-small
    "dim_model_base": (None,),  # MiniCPM divides its last hidden state by a ratio of it
}


def changed_logits(config: Any) -> str | None:
    """ "option = value" of a model whose logits are more than its output head times its last hidden state."""
    text = config.get_text_config()
    found = {option: getattr(text, option, None) for option in CHANGED_LOGITS}
    changes = [f"{option} = {value}" for option, value in found.items() if value not in CHANGED_LOGITS[option]]
    return changes[0] if changes else None


def output_head_names(name: str, role: str) -> list[str]:
    """Names under which a checkpoint may hold the weight of the model's output head; a tied one is the embedding's.

    Raises:
        RecipeError: the model has no output head that transformers knows, or one with a bias.
    """
    model = without_weights(load_model_config(name, role))
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        found = "has no output head that transformers names" if head is None else "has an output head with a bias"
        raise RecipeError(f"skd.loss.vocabulary=full: the {role} '{name}' {found}; use skd.loss.vocabulary=top_k")
    model.tie_weights()
    return [key for key, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight]


def load_output_head(model: str, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """The output head [V, J] of a checkpoint, without the rest of the model; `model` is a folder or a hub name.

    Raises:
        RuntimeError: the checkpoint holds no such tensor.
    """
    names = output_head_names(model, "teacher")
    for name, path in _stored_in(model, names):
        head = _tensor(path, name)
        if head is not None:
            return head.to(device=device, dtype=dtype)
    raise RuntimeError(
        f"the checkpoint '{model}' has no tensor {' or '.join(names)} in safetensors or bin files; save it again with "
        "transformers' save_pretrained, or use skd.loss.vocabulary=top_k"
    )


def output_head_type(model: str) -> str | None:
    """The type in which a checkpoint in safetensors files stores its output head ("BF16", "I8"); None: there is none
    of that name.
    """
    from safetensors import safe_open

    for name, path in _stored_in(model, output_head_names(model, "teacher")):
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    return file.get_slice(name).get_dtype()
    return None


def _stored_in(model: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of tensors, each with a file of the checkpoint that may hold it; the likeliest first."""
    from transformers.utils import cached_file

    find = partial(cached_file, model, _raise_exceptions_for_missing_entries=False)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = find(f"{stem}.{suffix}.index.json")
        if index is not None:
            with open(index) as file:
                places = json.load(file)["weight_map"]
            yield from ((name, find(places[name])) for name in names if name in places)
        elif (whole := find(f"{stem}.{suffix}")) is not None:
            yield from ((name, whole) for name in names)


def _tensor(path: str, name: str) -> torch.Tensor | None:
    if not path.endswith(".safetensors"):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True).get(name)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (it is no dictionary)
