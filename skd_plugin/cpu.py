"""What the host needs on a machine without CUDA. Nothing here touches a machine that has it.

OpenRLHF names CUDA devices, NCCL and bfloat16 outright. `install` makes those names mean the CPU, gloo and float32 in
this process: in the driver, in each Ray worker (as Ray's worker_process_setup_hook) and in vLLM's worker.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ENV = {  # of every process of a run on CPU
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's worker lives in its core process: one process less
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_TARGET_DEVICE": "cpu",
}

LOGICAL_GPUS = 8  # declared to Ray: the host reserves one for each actor


def install() -> None:
    """Idempotent; does nothing where CUDA is present."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_skd_on_cpu", False):
        return
    torch.cuda._skd_on_cpu = True
    _cuda_means_cpu()
    _stub_flash_attention()


def _cuda_means_cpu() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(cuda, name, _make_noop())  # one object each: TorchDynamo's tables are keyed by the function
    import torch.distributed.device_mesh as device_mesh

    real = device_mesh.init_device_mesh

    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return real("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    device_mesh.init_device_mesh = torch.distributed.init_device_mesh = init_device_mesh


def _make_noop() -> Callable[..., None]:
    def noop(*args: Any, **kwargs: Any) -> None:
        return None

    return noop


def _stub_flash_attention() -> None:
    """The host imports flash-attn's packing helpers at import; packing itself is refused by the recipe checks."""
    if importlib.util.find_spec("flash_attn") is not None:
        return

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


def adapt_host_trainer() -> None:
    """In the process of a DeepSpeed actor: the replay buffer's device, the weight-sync group, the parameter dtype."""
    if torch.cuda.is_available():
        return
    import openrlhf.trainer.ppo_utils.replay_buffer as replay_buffer
    import openrlhf.utils.utils as host_utils

    replay_buffer.torch = _TorchOnCpu()
    host_utils.convert_to_torch_dtype = lambda name: torch.float32
    adapt_weight_sync()
    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    import openrlhf.utils.distributed_util as distributed_util

    ppo_actor.stateless_init_process_group = distributed_util.stateless_init_process_group


def adapt_weight_sync() -> None:
    """In both ends of the weight sync: gloo in place of NCCL."""
    if torch.cuda.is_available():
        return
    import openrlhf.utils.distributed_util as distributed_util

    distributed_util.stateless_init_process_group = gloo_process_group


@contextmanager
def loadable_weights() -> Iterator[None]:
    """A vLLM model that is loaded inside can be loaded again.

    On a CPU with oneDNN or AMX vLLM packs each weight into a form of its own and drops the original; new weights would
    then be refused, or, worse, be stored where nothing reads them.
    """
    if torch.cuda.is_available():
        yield
        return
    import vllm.model_executor.layers.utils as layers

    def keep_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    packing, layers.dispatch_cpu_unquantized_gemm = layers.dispatch_cpu_unquantized_gemm, keep_weight
    try:
        yield
    finally:
        layers.dispatch_cpu_unquantized_gemm = packing


class _TorchOnCpu:
    """`torch` as the host's replay buffer sees it: "cuda:<current device>" is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu" if name.startswith("cuda") else name)


class GlooGroup:
    """The one method that the weight sync uses of vLLM's PyNcclCommunicator."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()


def gloo_process_group(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> GlooGroup:
    """Same arguments as the host's `stateless_init_process_group`."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return GlooGroup(
        stateless_init_torch_distributed_process_group(master_address, master_port, rank, world_size, backend="gloo")
    )
