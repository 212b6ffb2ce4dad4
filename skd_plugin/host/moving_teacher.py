"""A teacher that follows the student: a running mean of its weights, or what it was some steps ago.

Kept in the trainer as float32 shards in ordinary memory, one a parameter and rank, whatever ZeRO does with the
parameters; sent by the same buckets as the student, into the engine's own model and not into its draft model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from skd_plugin.config.schema import FollowConfig

FOLDER = "_teacher"  # of checkpoints, beside OpenRLHF's


class MovingTeacher:
    def __init__(self, model: torch.nn.Module, follow: FollowConfig) -> None:
        """`model`: the student before its first update, which the teacher is then, too."""
        self._model, self._follow = model, follow
        self._shards = [_shard(p).detach().to("cpu", torch.float32, copy=True) for p in model.parameters()]

    def is_due(self, step: int) -> bool:
        """Whether the teacher moves after this step."""
        return step > 0 and step % self._follow.every == 0

    @torch.no_grad()
    def move(self) -> None:
        """teacher <- ema x teacher + (1 - ema) x student."""
        for mine, parameter in zip(self._shards, self._model.parameters(), strict=True):
            mine.lerp_(_shard(parameter).to("cpu", torch.float32), 1.0 - self._follow.ema)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it is open, the trainer's model has the teacher's weights, in its own dtype."""
        parameters = list(self._model.parameters())
        for parameter in parameters:
            if getattr(parameter, "ds_status", None) is ZeroParamStatus.AVAILABLE:
                parameter.partition()  # a small one that ZeRO-3 keeps whole, beside its shard
        students = [_shard(parameter).detach().clone() for parameter in parameters]
        try:
            for mine, parameter in zip(self._shards, parameters, strict=True):
                _shard(parameter).copy_(mine)
            yield
        finally:
            for own, parameter in zip(students, parameters, strict=True):
                _shard(parameter).copy_(own)

    def save(self, checkpoints: Path, tag: str) -> None:
        """Before the student's checkpoint of this tag is written, in a folder beside those: where that one is whole,
        this one is. Those whose student is gone go, too.
        """
        folder = checkpoints / FOLDER
        for old in folder.glob("*"):
            if old.name != tag and not (checkpoints / "_actor" / old.name).exists():
                shutil.rmtree(old, ignore_errors=True)  # another rank may be at it
        (folder / tag).mkdir(parents=True, exist_ok=True)
        torch.save(self._shards, folder / tag / _file())

    def load(self, checkpoints: Path) -> None:
        """The one of the checkpoint that DeepSpeed loads.

        Raises:
            RuntimeError: there is none of this run's.
        """
        file = checkpoints / FOLDER / (checkpoints / "_actor" / "latest").read_text().strip() / _file()
        shards = torch.load(file, weights_only=True) if file.exists() else []
        if [shard.shape for shard in shards] != [shard.shape for shard in self._shards]:
            raise RuntimeError(
                f"{file} does not hold the teacher that moved with this student: the run was of another number of "
                "ranks, at another stage of ZeRO, or without skd.teacher.follow. Go on as it was, or begin anew"
            )
        self._shards = shards


def _file() -> str:
    return f"rank{torch.distributed.get_rank()}.pt"


def _shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: with ZeRO-3 a part of it, else the whole."""
    return getattr(parameter, "ds_tensor", parameter.data)
