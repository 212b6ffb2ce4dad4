"""Receives the trained student's weights in vLLM's worker and loads them into the draft model.

Passed to vLLM by path as `worker_extension_cls`, in place of the host's WorkerWrap, which it extends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap

from skd_plugin.host import on_cpu

WORKER_EXTENSION_CLS = "skd_plugin.host.weight_sync.StudentWeights"


@dataclass(frozen=True)
class Bucket:
    """Some parameters laid end to end in one flat tensor; the unit in which weights travel."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype

    def unpack(self, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = flat.split(sizes)
        return [(n, part.view(shape)) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)]

    @property
    def size(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


class StudentWeights(WorkerWrap):
    def init_process_group(self, *args: Any, **kwargs: Any) -> None:
        on_cpu.adapt_weight_sync()
        super().init_process_group(*args, **kwargs)

    def update_weight(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a weight came by the host's one-parameter path, which would overwrite the teacher")

    update_weight_cuda_ipc = update_weight

    def receive_student(
        self,
        names: list[str],
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        ipc_handles: dict[str, Any] | None = None,
    ) -> None:
        """One bucket, by broadcast from the trainer's rank 0, or through CUDA IPC where both share a GPU.

        The bucket comes in pieces, because vLLM's messages to its workers do not carry classes.
        """
        bucket = Bucket(names, shapes, dtype)
        if ipc_handles is None:
            flat = torch.empty(bucket.size, dtype=bucket.dtype, device=self.device)
            self._broadcast(flat)
        else:
            flat = self._open_ipc(ipc_handles)
        self.model_runner.drafter.load_student(bucket.unpack(flat))
        if ipc_handles is not None:
            torch.cuda.synchronize()  # the trainer frees the memory behind the handle when this call returns

    def _broadcast(self, flat: torch.Tensor) -> None:
        if self._model_update_with_ray:
            import ray.util.collective as collective

            collective.broadcast(flat, 0, group_name=self._model_update_group)
        else:
            stream = torch.cuda.current_stream() if flat.is_cuda else None
            self._model_update_group.broadcast(flat, src=0, stream=stream)

    def _open_ipc(self, ipc_handles: dict[str, Any]) -> torch.Tensor:
        from openrlhf.trainer.ray.utils import get_physical_gpu_id

        rebuild, arguments = ipc_handles[get_physical_gpu_id()]
        arguments = list(arguments)
        arguments[6] = self.device.index  # the same GPU may have another number in this process
        return rebuild(*arguments)
