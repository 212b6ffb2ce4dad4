"""Weights of which each rank holds its part: put together, and kept beside OpenRLHF's checkpoints, which know of the
student alone. A rank's part is ZeRO-3's or, with `ds.tensor_parallel_size`, that of DeepSpeed's AutoTP, or one of the
other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of the parameter in the model's checkpoint, whatever this rank holds of it."""
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    cut = getattr(parameter, DS_AUTOTP_UC_META, None)
    return torch.Size(cut["original_shape"]) if cut else getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def whole(parameters: Sequence[torch.nn.Parameter], *, zero_stage: int) -> Iterator[None]:
    """While it is open, every rank has the parameters whole. All ranks must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), enabled=zero_stage == 3):
        # Its method is of the layer that AutoTP has put in place.
        cut = [(parameter, parameter.data) for parameter in parameters if hasattr(parameter, "gather_params")]
        for parameter, _ in cut:
            parameter.gather_params([parameter])
        try:
            yield
        finally:
            for parameter, own in cut:  # as it was: an optimizer may have the memory that it lies in
                parameter.data = own


def shard_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: with ZeRO-3 a part of it, else the whole."""
    return getattr(parameter, "ds_tensor", parameter.data)


def save(folder: Path, tag: str, shards: Sequence[torch.Tensor]) -> None:
    """Called before the student's checkpoint of this tag is written, beside those (`_actor`): where that one is whole,
    this one is. Those whose student is gone go, too.
    """
    for old in folder.glob("*"):
        if old.name != tag and not (folder.with_name("_actor") / old.name).exists():
            shutil.rmtree(old, ignore_errors=True)  # another rank may be at it
    (folder / tag).mkdir(parents=True, exist_ok=True)
    torch.save(list(shards), folder / tag / _file())


def load(folder: Path, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the checkpoint that DeepSpeed loads.

    Raises:
        RuntimeError: there are none of the sizes that this rank has.
    """
    tag = (folder.with_name("_actor") / "latest").read_text().strip()
    file = folder / tag / _file()
    shards = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else []
    if [shard.shape for shard in shards] != [shard.shape for shard in like]:
        raise RuntimeError(
            f"{file} does not hold the weights that belong to this checkpoint: the run was of another number of "
            "ranks, at another stage of ZeRO, or without what they are of. Go on as it was, or begin anew"
        )
    return shards


def _file() -> str:
    return f"rank{torch.distributed.get_rank()}.pt"
