"""Weights of which each rank holds its part, kept beside OpenRLHF's checkpoints, which know of the student alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch


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
