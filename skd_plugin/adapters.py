"""LoRA adapters (arXiv 2106.09685) of the student: which weights have one, and a weight with its adapter merged in.

The trainer computes W x + s B (A x) with W frozen; vLLM's draft model has one weight, W + s B A. An adapter's folder
has no weights of the model itself: who gives it to an engine merges it first.

Shapes: W [O, I], A [R, I], B [O, R].
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skd_plugin import trust
from skd_plugin.errors import RecipeError
from skd_plugin.models import load_model_config, load_tokenizer
from skd_plugin.words import first_line

SETTINGS = "adapter_config.json"  # what makes a folder one of an adapter
ALL_LINEAR = "all-linear"  # peft's word for all of a model's linear layers but its output head


class LoraOptions(NamedTuple):
    """OpenRLHF's `ds.lora.*`."""

    rank: int
    alpha: int
    dropout: float
    target_modules: str | list[str]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LoraOptions | None:
        """Of all of OpenRLHF's options by their dotted names; None where the student is trained whole."""
        if not options["ds.lora.rank"]:
            return None
        return cls(*(options[f"ds.lora.{name}"] for name in cls._fields))


@dataclass(frozen=True)
class Adapter:
    a_RI: torch.nn.Parameter
    b_OR: torch.nn.Parameter
    scaling: float
    transposed: bool  # the layer keeps its weight as [I, O], as GPT-2 does

    def delta(self) -> torch.Tensor:
        """What it adds to the weight, in the weight's shape; float32."""
        delta_OI: torch.Tensor = self.scaling * (self.b_OR.float() @ self.a_RI.float())
        return delta_OI.T if self.transposed else delta_OI


class Weight(NamedTuple):
    """A parameter of a model, and its adapter if it has one."""

    base: torch.nn.Parameter
    adapter: Adapter | None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.base] if self.adapter is None else [self.base, self.adapter.a_RI, self.adapter.b_OR]

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """In the type of the parameter, which is rounded to once; the parameter itself stays as it is."""
        if self.adapter is None:
            return self.base.data
        return (self.base.float() + self.adapter.delta()).to(self.base.dtype)


def plain(model: Any) -> Any:
    """The model itself, without what peft wraps around it; its adapted layers stay."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def weights(model: torch.nn.Module) -> Iterator[tuple[str, Weight]]:
    """Those of a model with or without adapters, by the names and in the order that they have without.

    Raises:
        RuntimeError: a layer with an adapter of another kind (`adapter_of`).
    """
    adapters = {id(layer.get_base_layer().weight): adapter_of(layer) for _, layer in adapted_layers(model)}
    for name, parameter in plain(model).named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), Weight(parameter, adapters.get(id(parameter)))


def adapted_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """peft's layers with an adapter, by their names in the model itself."""
    return [(name, module) for name, module in plain(model).named_modules() if is_adapted(module)]


def is_adapted(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def adapter_of(layer: Any) -> Adapter:
    """Raises RuntimeError for a layer whose adapter is not a product B A beside one linear layer."""
    from peft.tuners.lora import Linear

    (name,) = layer.active_adapters
    if type(layer) is not Linear or layer.lora_variant or layer.merged:
        raise RuntimeError(f"{type(layer).__name__}: only LoRA beside a linear layer can be merged for the engine")
    a, b = layer.lora_A[name], layer.lora_B[name]
    return Adapter(a.weight, b.weight, layer.scaling[name], layer.fan_in_fan_out)


def with_adapters(model: Any, lora: LoraOptions) -> Any:
    """As OpenRLHF's Actor wraps the student."""
    from peft import LoraConfig, TaskType, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.target_modules,
            lora_dropout=lora.dropout,
            bias="none",
        ),
    )


def base_of(name: str) -> str | None:
    """The model that an adapter's folder was trained on; None where the name is not of such a folder.

    Raises:
        RecipeError: the folder does not say.
    """
    path = Path(name) / SETTINGS
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} does not name its model in base_model_name_or_path: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise RecipeError(f"{path} has base_model_name_or_path {base!r}, but must name a model")
    return base


def check_folder(name: str, role: str) -> None:
    """Raises RecipeError for an adapter's folder that does not describe its model, as those of OpenRLHF do; others
    than adapters' are not looked at.
    """
    if base_of(name) is None:
        return
    missing = [file for file in ("config.json", "tokenizer_config.json") if not (Path(name) / file).is_file()]
    if missing:
        raise RecipeError(
            f"the {role} '{name}' is a LoRA adapter without {' and '.join(missing)}; merge it with "
            f"python scripts/merge_adapter.py {name} FOLDER, and name the folder"
        )


def refuse_adapter(name: str, role: str) -> None:
    """Raises RecipeError for an adapter's folder where a whole model is needed."""
    base = base_of(name)
    if base is not None:
        raise RecipeError(
            f"the {role} '{name}' is a LoRA adapter of '{base}', without the weights of a model; merge the two with "
            f"python scripts/merge_adapter.py {name} FOLDER, and name the folder"
        )


def whole(model: str, into: Path, dtype: str) -> str:
    """A model that an engine can load: the same, or of an adapter's folder what `merge` writes."""
    if base_of(model) is None:
        return model
    merge(model, into, dtype)
    return str(into)


def merge(folder: str, into: Path, dtype: str = "auto") -> None:
    """Writes the model that an adapter's folder stands for, whole, with its tokenizer.

    Args:
        dtype: to which the weights are rounded; "auto" is that of the base.

    Raises:
        RecipeError: the folder or its base cannot be read, or the adapter is of a kind that cannot be merged.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_of(folder)
    if base is None:
        raise RecipeError(f"'{folder}' is no adapter: it has no {SETTINGS}")
    load_model_config(base, "adapter's base")  # with its own words where it is not there
    trust.refuse_pickles(base, "adapter's base")
    tokenizer = load_tokenizer(folder if (Path(folder) / "tokenizer_config.json").is_file() else base, "adapter")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=trust.may_run_code())
        # Its weights may be a pickle, as OpenRLHF writes them at ZeRO-3; peft reads nothing but tensors of one.
        adapted = PeftModel.from_pretrained(model, folder)
        for _, weight in weights(adapted):
            weight.base.data = weight.merged()
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"the adapter '{folder}' cannot be merged into '{base}': {first_line(error)}") from error
    adapted.unload().save_pretrained(into)
    tokenizer.save_pretrained(into)
