"""OpenRLHF on a machine without CUDA. Nothing here touches a machine that has it.

It imports flash-attn, and names CUDA devices, NCCL and bfloat16 outright; here they become stubs, the CPU, gloo and
float32.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from skd_plugin import cpu
from skd_plugin.seams import rebind

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def install() -> None:
    """Before OpenRLHF is imported, in the driver and in each Ray worker (as Ray's worker_process_setup_hook).

    Idempotent.
    """
    cpu.install()
    if not torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is None:
        _stand_in_for_flash_attention()


def _stand_in_for_flash_attention() -> None:
    """OpenRLHF imports flash-attn's helpers of packed sequences, which need no GPU. The attention itself is torch's,
    which transformers keeps within each sequence by the position ids.
    """

    padding = {"index_first_axis": _index_first_axis, "rearrange": _rearrange}
    padding |= {"pad_input": _pad_input, "unpad_input": _unpad_input}
    modules: dict[str, dict[str, Callable[..., Any]]] = {
        "flash_attn": {},
        "flash_attn.bert_padding": padding,
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": _AllGather.apply},
    }
    for name, functions in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        module.__path__ = []
        vars(module).update(functions)
        sys.modules[name] = module


class _AllGather(torch.autograd.Function):
    """Rows of all ranks [R S, ...] from those of each [S, ...]; backwards the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, rows_S: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows_S, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, rows_S.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()], None


def _rearrange(values_BT: torch.Tensor, pattern: str) -> torch.Tensor:
    if pattern != "b s ... -> (b s) ...":
        raise NotImplementedError(f"rearrange {pattern!r}: OpenRLHF asked for another pattern before")
    return values_BT.flatten(0, 1)


def _index_first_axis(rows: torch.Tensor, places_S: torch.Tensor) -> torch.Tensor:
    return rows[places_S]


def _unpad_input(values_BT: torch.Tensor, attention_mask: torch.Tensor) -> tuple[Any, ...]:
    """(values [S, ...], their places in the flat batch [S], starts of the sequences [B + 1], the longest, lengths)."""
    lengths_B = attention_mask.sum(-1, dtype=torch.int32)
    places_S = attention_mask.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))
    return values_BT.flatten(0, 1)[places_S], places_S, starts, int(lengths_B.max()), lengths_B


def _pad_input(rows_S: torch.Tensor, places_S: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """The inverse: [B, T, ...] with 0 where there is no token; differentiable, as `gather_and_pad_tensor` needs it."""
    padded = rows_S.new_zeros((batch * length, *rows_S.shape[1:]))
    return padded.index_put((places_S,), rows_S).unflatten(0, (batch, length))


def adapt_trainer() -> None:
    """In the process of a DeepSpeed actor: the replay buffer's device, the weight-sync group, the parameter dtype, the
    optimizer, the gathering of ZeRO-3.
    """
    if torch.cuda.is_available():
        return
    import deepspeed.ops
    import deepspeed.runtime.zero.partition_parameters as partition_parameters
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
    mean = host_strategy.DeepspeedStrategy.moving_average
    rebind(
        host_strategy.DeepspeedStrategy,
        "moving_average",
        lambda strategy, model, of, beta, device: mean(strategy, model, of, beta, "cpu"),
    )
    rebind(partition_parameters, "dist", _GatherOnCpu(partition_parameters.dist))
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


class _GatherOnCpu:
    """`deepspeed.comm` as ZeRO-3 sees it where it gathers parameters. It starts one operation for each and waits for
    the last one alone, which on a GPU ends last; gloo's end in any order, so that a parameter could be read half-way.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_gather_into_tensor(self, *args: Any, **kwargs: Any) -> Any:
        handle = self._comm.all_gather_into_tensor(*args, **kwargs)
        if handle is not None:
            handle.wait()
        return handle
