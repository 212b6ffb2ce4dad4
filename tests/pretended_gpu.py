"""A GPU that is none: its tensors lie in ordinary memory, and every wait for it, and every copy, is counted.

A tensor of it says that its device is `cuda`, so that code takes the ways that it takes on a GPU, and what would wait
there is seen. Values are those of a CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")  # a build without CUDA refuses every call that names it
# Operators that need a value of a tensor, or a number of elements that only its values tell.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2", "item"}


class OnGpu(torch.Tensor):
    """`held` is what it holds, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        tensor.held = held
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of PretendedGpu")


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


class PretendedGpu(TorchDispatchMode):
    """`waits` counts by operator where the CPU would wait for the GPU, `big` the bytes of results of this size."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._pinned: set[int] = set()
        self._keep: list[torch.Tensor] = []  # so that no two tensors have one id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        on_gpu = any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs)))
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "_to_copy" and wanted is not None and (on_gpu != (torch.device(wanted).type == GPU.type)):
            self._copy(args[0], on_gpu, bool(kwargs.get("non_blocking")))
        elif name == "is_pinned":
            return id(args[0]) in self._pinned
        elif name in ("pin_memory", "_pin_memory"):
            made = args[0].clone()
            self._pinned.add(id(made))
            self._keep.append(made)
            return made
        elif on_gpu:
            self._look(name, args, kwargs)
        target = on_gpu if wanted is None else torch.device(wanted).type == GPU.type
        kwargs.pop("pin_memory", None)
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
        if not target:
            return result
        inputs = {id(leaf.held): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnGpu)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return inputs[id(value)] if id(value) in inputs else OnGpu(value)

        return tree_map(wrap, result)

    def _copy(self, source: torch.Tensor, from_gpu: bool, non_blocking: bool) -> None:
        self.copies["to the CPU" if from_gpu else "to the GPU"] += 1
        if from_gpu and not non_blocking:
            self.waits["copy to the CPU"] += 1
        if not from_gpu and not (non_blocking and id(source) in self._pinned):
            self.waits["copy to the GPU of memory that is not pinned"] += 1

    def _look(self, name: str, args: Any, kwargs: Any) -> None:
        masks = name.startswith("index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1:2])
        )
        sizes = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _WAITS or masks or sizes:
            self.waits[name] += 1
        if name == "copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu) and args[1].dim():
            self.waits["copy_"] += 1


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return OnGpu(tensor)
