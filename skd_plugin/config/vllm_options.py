"""Engine arguments of the user's (skd.vllm), checked against vLLM's own list of them."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from skd_plugin.config.context import context_needed
from skd_plugin.errors import RecipeError, unknown_key

# Arguments by which SKD is in the engine, and the option that has their place.
RESERVED = {
    "model": "skd.teacher.model_name_or_path and openrlhf.actor.model_name_or_path",
    "speculative_config": "skd.rollout.draft_len",
    "worker_cls": "SKD's own",
    "worker_extension_cls": "OpenRLHF's, for the weights",
    "scheduler_cls": "SKD's own",
    "additional_config": "SKD's own",
    "async_scheduling": "off: the sampler must see each step's tokens before the next",
}

# What rounds the weights of an engine's model. Its draft model has settings of its own, which stay unset.
OF_TEACHER = ("quantization", "quantization_config")

# Ways to spread one engine over more processes: the value at which nothing is spread, and why no other is taken.
# OpenRLHF places, and counts in the group of the weight sync, engines x its own tensor_parallel_size.
UNPLACED = "OpenRLHF would place no GPUs for it, and the weights of the student would not reach it"
SPREAD: dict[str, tuple[Any, str]] = {
    "tensor_parallel_size": (1, "set openrlhf.vllm.tensor_parallel_size, by which OpenRLHF places an engine's GPUs"),
    "pipeline_parallel_size": (1, f"{UNPLACED}; set openrlhf.vllm.tensor_parallel_size"),
    "data_parallel_size": (1, f"{UNPLACED}; set openrlhf.vllm.num_engines"),
    "prefill_context_parallel_size": (1, UNPLACED),
    "decode_context_parallel_size": (1, "nobody has tried it with a draft model's cache"),
    "nnodes": (1, f"{UNPLACED}; Ray places an engine on several nodes by itself"),
    "enable_expert_parallel": (
        False,
        "vLLM does not give it to a draft model, and its workers on a CPU crash with it",
    ),
}

# Arguments that are a whole number of things.
COUNTS = {
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "block_size",
}


@cache
def engine_arguments() -> frozenset[str]:
    """Names of the fields of vLLM's EngineArgs, read from its source: an import costs ten seconds.

    Raises:
        RuntimeError: vLLM is not installed, or no longer has the form that this reads.
    """
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        raise RuntimeError("vllm is not installed; run scripts/install.sh")
    source = Path(package.origin).parent / "engine" / "arg_utils.py"
    tree = ast.parse(source.read_text())
    fields = {
        statement.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    if "max_model_len" not in fields:
        raise RuntimeError(f"{source} has no EngineArgs with fields any more; see skd_plugin/config/vllm_options.py")
    return frozenset(fields)


def check_vllm(options: Mapping[str, Any], *, max_len: int, draft_len: int) -> None:
    """Raises RecipeError for an argument that vLLM does not have, that is SKD's, or that leaves it too little room."""
    for name, value in options.items():
        if name in RESERVED:
            raise RecipeError(f"skd.vllm.{name} cannot be set, as the engine would not be SKD's: {RESERVED[name]}")
        if name not in engine_arguments():
            raise RecipeError(f"skd.vllm: {unknown_key(name, engine_arguments())}; vLLM's EngineArgs lists them")
        allowed, reason = SPREAD.get(name, (value, ""))
        if value != allowed and value is not None:
            raise RecipeError(f"skd.vllm.{name} is {value!r}, but must be {allowed!r}: {reason}")
        if name in COUNTS and value is not None and not (type(value) is int and value >= 1):
            raise RecipeError(f"skd.vllm.{name} is {value!r}, but must be a whole number, 1 or more")
    share = options.get("gpu_memory_utilization")
    if share is not None and not (isinstance(share, float | int) and 0 < share <= 1):
        raise RecipeError(f"skd.vllm.gpu_memory_utilization is {share!r}, but must be above 0 and at most 1")
    needed, given = context_needed(max_len, draft_len), options.get("max_model_len")
    if given is not None and given < needed:
        raise RecipeError(
            f"skd.vllm.max_model_len is {given}, but openrlhf.data.max_len = {max_len} with skd.rollout.draft_len = "
            f"{draft_len} needs {needed}; leave it out"
        )
