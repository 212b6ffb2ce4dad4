"""The trained student's weights on their way into the engines' draft model: both ends, and what travels between."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from skd_plugin.adapters import Weight, plain, weights
from skd_plugin.host import on_cpu
from skd_plugin.host.moving_teacher import MovingTeacher
from skd_plugin.host.shards import whole, whole_shape

BUCKET_BYTES = 512 << 20  # one message; a larger parameter travels alone
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
    """The engine's end: passed to vLLM by path as `worker_extension_cls`, in place of OpenRLHF's WorkerWrap."""

    def init_process_group(self, *args: Any, **kwargs: Any) -> None:
        on_cpu.adapt_weight_sync()
        super().init_process_group(*args, **kwargs)

    def update_weight(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a weight came by OpenRLHF's one-parameter path, which would overwrite the teacher")

    update_weight_cuda_ipc = update_weight

    def receive_student(
        self,
        names: list[str],
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        ipc_handles: dict[str, Any] | None = None,
        into_teacher: bool = False,
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
        load = self.load_teacher if into_teacher else self.load_student  # of the worker that this is mixed into
        load(bucket.unpack(flat))
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


class StudentSender:
    """The trainer's end: the student's weights to every engine's draft model, few large messages and not one call a
    parameter, as in OpenRLHF's `broadcast_to_vllm`. OpenRLHF's trainer has made the process group
    (`_init_vllm_sync_group`), or shares its GPU with the engines (CUDA IPC).
    """

    def __init__(self, trainer: Any) -> None:
        """`trainer`: OpenRLHF's ActorPPOTrainer; every rank must send."""
        self._model = trainer.actor.model.module
        self._engines = trainer.vllm_engines
        self._args = trainer.strategy.args
        self._use_cuda_ipc = trainer.use_cuda_ipc
        self._group: Any = getattr(trainer, "_model_update_group", None)  # of rank 0, where weights are broadcast

    def send(self, version: int, moving: MovingTeacher | None = None) -> None:
        """
        Args:
            version: updates that the student has had.
            moving: the teacher, where it has moved and must be sent, too.
        """
        from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync

        torch.cuda.empty_cache()
        self._send_model(into_teacher=False)
        if moving is not None:
            with moving.in_place():
                self._send_model(into_teacher=True)
        if torch.distributed.get_rank() == 0:
            told = [engine.student_is.remote(version) for engine in self._engines]
            ray.get(told + [engine.reset_prefix_cache.remote() for engine in self._engines])
        torch.cuda.empty_cache()
        torch_dist_barrier_and_cuda_sync()

    def _send_model(self, *, into_teacher: bool) -> None:
        for bucket, named in buckets(self._model):
            parameters = [parameter for weight in named.values() for parameter in weight.parameters]
            with whole(parameters, zero_stage=self._args.ds.zero_stage):
                if self._use_cuda_ipc:
                    self._send_by_ipc(bucket, into_teacher, flatten(self._model, named))
                elif torch.distributed.get_rank() == 0:
                    self._send_by_broadcast(bucket, into_teacher, flatten(self._model, named))

    def _send_by_broadcast(self, bucket: Bucket, into_teacher: bool, flat: torch.Tensor) -> None:
        refs = [engine.receive_student.remote(bucket, into_teacher=into_teacher) for engine in self._engines]
        # In a thread of its own: a broadcast to an engine that has died never returns, but its Ray call does.
        stream = torch.cuda.current_stream() if flat.is_cuda else None
        sender = threading.Thread(target=self._broadcast, args=(flat, stream), daemon=True)
        sender.start()
        while refs:
            arrived, refs = ray.wait(refs, num_returns=1)
            ray.get(arrived)
        sender.join()

    def _broadcast(self, flat: torch.Tensor, stream: Any) -> None:
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)  # a thread starts on device 0
        if getattr(self._args.vllm, "sync_with_ray", False):
            import ray.util.collective as collective

            collective.broadcast(flat, 0, group_name=self._group)
        else:
            self._group.broadcast(flat, src=0, stream=stream)

    def _send_by_ipc(self, bucket: Bucket, into_teacher: bool, flat: torch.Tensor) -> None:
        from openrlhf.trainer.ray.utils import get_physical_gpu_id
        from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync
        from torch.multiprocessing.reductions import reduce_tensor

        handles: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(handles, {get_physical_gpu_id(): reduce_tensor(flat)})
        if torch.distributed.get_rank() == 0:
            merged = {gpu: handle for handle_of_rank in handles for gpu, handle in handle_of_rank.items()}
            ray.get([engine.receive_student.remote(bucket, merged, into_teacher) for engine in self._engines])
        torch_dist_barrier_and_cuda_sync()


def buckets(model: torch.nn.Module) -> Iterator[tuple[Bucket, dict[str, Weight]]]:
    """A model's weights by their names, in their order, as many together as `BUCKET_BYTES` hold, of one dtype; and
    what they are in its checkpoint, which is how vLLM knows them. An adapter travels within the weight that it is for.
    """

    def shape(weight: Weight) -> torch.Size:
        return whole_shape(weight.base)

    def dtype_of(named: dict[str, Weight]) -> torch.dtype:
        return next(iter(named.values())).base.dtype

    def made(named: dict[str, Weight]) -> tuple[Bucket, dict[str, Weight]]:
        dtype = dtype_of(named)
        shapes = {name: torch.empty(shape(weight), dtype=dtype, device="meta") for name, weight in named.items()}
        known = as_checkpoint(model, shapes)
        return Bucket(list(known), [tuple(tensor.shape) for tensor in known.values()], dtype), named

    open_bucket: dict[str, Weight] = {}
    size = 0
    for name, weight in weights(model):
        num_bytes = shape(weight).numel() * weight.base.element_size()
        full = size + num_bytes > BUCKET_BYTES
        if open_bucket and (full or weight.base.dtype != dtype_of(open_bucket)):
            yield made(open_bucket)
            open_bucket, size = {}, 0
        open_bucket[name] = weight
        size += num_bytes
    yield made(open_bucket)


def flatten(model: torch.nn.Module, named: Mapping[str, Weight]) -> torch.Tensor:
    """Weights of a bucket, whole and merged with their adapters, in the order of its names."""
    known = as_checkpoint(model, {name: weight.merged() for name, weight in named.items()})
    return torch.cat([tensor.reshape(-1) for tensor in known.values()])


def as_checkpoint(model: torch.nn.Module, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names and in the parts in which transformers saves them; some models have others in memory."""
    model = plain(model)
    return revert_weight_conversion(model, named) if isinstance(model, PreTrainedModel) else named
