"""A teacher that follows the student: a running mean of its weights, or what it was some steps ago.

Kept in the trainer as float32 shards in ordinary memory, one a parameter and rank, whatever ZeRO does with the
parameters; sent by the same buckets as the student, into the engine's own model and not into its draft model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from skd_plugin.config.teacher import FollowConfig
from skd_plugin.host import shards
from skd_plugin.host.shards import shard_of

FOLDER = "_teacher"  # of checkpoints, beside OpenRLHF's


class MovingTeacher:
    def __init__(self, model: torch.nn.Module, follow: FollowConfig) -> None:
        """`model`: the student before its first update, which the teacher is then, too."""
        self._model, self._follow = model, follow
        self._shards = [shard_of(p).detach().to("cpu", torch.float32, copy=True) for p in model.parameters()]

    def is_due(self, step: int) -> bool:
        """Whether the teacher moves after this step."""
        return step > 0 and step % self._follow.every == 0

    @torch.no_grad()
    def move(self) -> None:
        """teacher <- ema x teacher + (1 - ema) x student."""
        for mine, parameter in zip(self._shards, self._model.parameters(), strict=True):
            mine.lerp_(shard_of(parameter).to("cpu", torch.float32), 1.0 - self._follow.ema)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it is open, the trainer's model has the teacher's weights, in its own dtype."""
        parameters = list(self._model.parameters())
        for parameter in parameters:
            if getattr(parameter, "ds_status", None) is ZeroParamStatus.AVAILABLE:
                parameter.partition()  # a small one that ZeRO-3 keeps whole, beside its shard
        students = [shard_of(parameter).detach().clone() for parameter in parameters]
        try:
            for mine, parameter in zip(self._shards, parameters, strict=True):
                shard_of(parameter).copy_(mine)
            yield
        finally:
            for own, parameter in zip(students, parameters, strict=True):
                shard_of(parameter).copy_(own)

    def save(self, checkpoints: Path, tag: str) -> None:
        shards.save(checkpoints / FOLDER, tag, self._shards)

    def load(self, checkpoints: Path) -> None:
        self._shards = shards.load(checkpoints / FOLDER, self._shards)
