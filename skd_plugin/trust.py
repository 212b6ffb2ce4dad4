"""What of a model's folder may run as code: nothing, unless the recipe says so.

A model can bring Python files of its own, which transformers and vLLM import, and weights as pickles, which run what
is in them when they are loaded. What a recipe allows is kept in the environment, so that every process of it knows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from skd_plugin.errors import RecipeError
from skd_plugin.seams import rebind

REMOTE_CODE, PICKLE_WEIGHTS = "SKD_TRUST_REMOTE_CODE", "SKD_PICKLE_WEIGHTS"  # in the environment: "1" is allowed
SETTINGS = ("config.json", "tokenizer_config.json")  # those that may name code
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


def allow(*, remote_code: bool, pickle_weights: bool) -> None:
    """For this process and those that it starts."""
    os.environ[REMOTE_CODE], os.environ[PICKLE_WEIGHTS] = str(int(remote_code)), str(int(pickle_weights))


def may_run_code() -> bool:
    return os.environ.get(REMOTE_CODE) == "1"


def refuse_code(name: str, role: str) -> None:
    """Raises RecipeError for a model that brings code, unless it may run: before anything of it is imported."""
    if may_run_code():
        return
    for settings in SETTINGS:
        path = _find(name, settings)
        try:
            named = json.loads(path.read_bytes()).get("auto_map") if path else None
        except (OSError, ValueError, AttributeError):
            continue  # transformers says what is wrong with it
        if named:
            raise RecipeError(
                f"the {role} '{name}' brings code of its own: its {settings} names {', '.join(_files(named))}, which "
                "would run here. Read it, and set skd.trust_remote_code=true, or take a model that transformers knows"
            )


def refuse_pickles(name: str, role: str) -> None:
    """Raises RecipeError for a model whose weights are pickles only, unless they may be loaded."""
    if os.environ.get(PICKLE_WEIGHTS) == "1" or any(_find(name, file) for file in SAFETENSORS):
        return
    pickles = [file for file in PICKLES if _find(name, file)]
    if Path(name).is_dir():
        pickles += sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in Path(name).glob(pattern))
        pickles = [file for file in pickles if file not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if pickles and not (Path(name).is_dir() and any(Path(name).glob("*.safetensors"))):
        raise RecipeError(
            f"the {role} '{name}' has its weights in pickles ({pickles[0]}), which may run anything when they are "
            "loaded. Save it again as safetensors, or set skd.pickle_weights=true if you trust where it is from"
        )


def close_transformers() -> None:
    """In a process in which OpenRLHF loads models: it asks for their code by itself, and gets none that may not run.

    Idempotent.
    """
    import transformers.dynamic_module_utils as modules

    load = modules.get_class_in_module
    if getattr(load, "_skd_asks", False):
        return

    def ask_first(class_name: str, module_path: Any, **others: Any) -> type:
        if not may_run_code():
            raise RuntimeError(
                f"{module_path} is code that a model brings, and would run here; set skd.trust_remote_code=true to "
                "let it"
            )
        return load(class_name, module_path, **others)

    ask_first._skd_asks = True  # type: ignore[attr-defined]
    rebind(modules, "get_class_in_module", ask_first)


def _files(auto_map: Any) -> list[str]:
    """'configuration_x.py' of "configuration_x.XConfig", which "author/model--" may stand before."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    return sorted({f"{str(name).split('--')[-1].split('.')[0]}.py" for name in names})


def _find(name: str, file: str) -> Path | None:
    """A file of a model, which is a folder or a name on the Hub; None where it has none, or is not there itself."""
    if Path(name).is_dir():
        return path if (path := Path(name) / file).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None  # transformers says what is wrong with it
    return Path(found) if found else None
