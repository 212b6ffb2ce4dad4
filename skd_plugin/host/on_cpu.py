"""OpenRLHF on a machine without CUDA. Nothing here touches a machine that has it.

It imports flash-attn, and names CUDA devices, NCCL and bfloat16 outright; here they become stubs, the CPU, gloo and
float32.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch

from skd_plugin import cpu
from skd_plugin.seams import rebind

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def install() -> None:
    """Before OpenRLHF is imported, in the driver and in each Ray worker (as Ray's worker_process_setup_hook).

    Idempotent.
    """
    cpu.install()
    if not torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is None:
        _stub_flash_attention()


def _stub_flash_attention() -> None:
    """OpenRLHF imports its packing helpers at import; packing itself is refused by the recipe checks."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("flash-attn is not installed; turn off packing_samples and ring attention")

    names = {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }
    for module_name, functions in names.items():
        module = types.ModuleType(module_name)
        module.__spec__ = importlib.util.spec_from_loader(module_name, loader=None)
        module.__path__ = []
        for function in functions:
            setattr(module, function, missing)
        sys.modules[module_name] = module


def adapt_trainer() -> None:
    """In the process of a DeepSpeed actor: the replay buffer's device, the weight-sync group, the parameter dtype, the
    optimizer.
    """
    if torch.cuda.is_available():
        return
    import deepspeed.ops
    import openrlhf.trainer.ppo_utils.replay_buffer as replay_buffer
    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    import openrlhf.utils.deepspeed.deepspeed as host_strategy
    import openrlhf.utils.utils as host_utils

    from skd_plugin.engine.gloo import gloo_process_group

    rebind(replay_buffer, "torch", _TorchOnCpu())
    rebind(host_utils, "convert_to_torch_dtype", lambda name: torch.float32)
    adapt_weight_sync()
    rebind(ppo_actor, "stateless_init_process_group", gloo_process_group)
    rebind(host_strategy, "get_train_ds_config", _with_torch_adam)
    # An operator of inference over several ranks, which DeepSpeed would compile first; without it gloo does that.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False


def adapt_weight_sync() -> None:
    """In both ends of the weight sync: gloo in place of NCCL."""
    if torch.cuda.is_available():
        return
    import openrlhf.utils.distributed_util as distributed_util

    from skd_plugin.engine.gloo import gloo_process_group

    rebind(distributed_util, "stateless_init_process_group", gloo_process_group)


def _with_torch_adam(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """DeepSpeed's configuration with torch's fused AdamW: DeepSpeed's own is built at its first use, which takes a
    compiler and a minute and a half, and waits for ever on the lock of a build that was killed.
    """
    from openrlhf.utils.deepspeed.deepspeed_utils import get_train_ds_config

    config = get_train_ds_config(*args, **kwargs)
    if config.get("optimizer", {}).get("type") == "AdamW":
        config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    return config


class _TorchOnCpu:
    """`torch` as OpenRLHF's replay buffer sees it: "cuda:<current device>" is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu" if name.startswith("cuda") else name)
