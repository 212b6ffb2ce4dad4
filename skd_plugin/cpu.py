"""What a machine without CUDA needs. Nothing here touches a machine that has it.

OpenRLHF names CUDA devices outright. `install` makes those names mean the CPU in this process. The rest of what
OpenRLHF needs there is in host/on_cpu.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.device_mesh as device_mesh

from skd_plugin.seams import rebind

LOGICAL_GPUS = 8  # declared to Ray: OpenRLHF reserves one for each actor


def environment() -> dict[str, str]:
    """Of every process of a run on CPU. Each has one thread, for small models gain nothing by more, or OMP_NUM_THREADS
    of the shell.
    """
    return {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's worker lives in its core process: one process less
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_TARGET_DEVICE": "cpu",
    }


def install() -> None:
    """Idempotent; does nothing where CUDA is present."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_skd_on_cpu", False):
        return
    cuda: Any = torch.cuda
    cuda._skd_on_cpu = True
    rebind(cuda, "current_device", lambda: torch.device("cpu"))
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        rebind(cuda, name, _make_noop())  # one object each: TorchDynamo's tables are keyed by the function

    real = device_mesh.init_device_mesh

    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return real("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    rebind(device_mesh, "init_device_mesh", init_device_mesh)


def _make_noop() -> Callable[..., None]:
    def noop(*args: Any, **kwargs: Any) -> None:
        return None

    return noop
