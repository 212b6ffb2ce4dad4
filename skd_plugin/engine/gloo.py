"""A process group of gloo that looks like vLLM's of NCCL, for the weight sync on a machine without CUDA."""

from __future__ import annotations

from typing import Any

import torch


class GlooGroup:
    """The one method that the weight sync uses of vLLM's PyNcclCommunicator."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()


def gloo_process_group(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> GlooGroup:
    """Same arguments as OpenRLHF's `stateless_init_process_group`."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return GlooGroup(
        stateless_init_torch_distributed_process_group(master_address, master_port, rank, world_size, backend="gloo")
    )
