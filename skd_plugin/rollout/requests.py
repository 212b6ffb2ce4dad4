"""What the engine's worker knows of each request in flight: how to sample it, and its trace so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from skd_plugin.core.trace import Trace

EXTRA_ARGS_KEY = "skd"  # the entry of vLLM's SamplingParams.extra_args that carries a `RequestParams`


@dataclass(frozen=True)
class RequestParams:
    """How one request is sampled."""

    trace_id: int  # names the trace when it is fetched; unique in the engine
    first_token: int  # last token of the prompt, forced as the first output so that the student proposes what follows
    seed: int  # of the request's own random stream
    top_k: int  # K of the gate; >= vocabulary keeps every proposal, 0 none
    student_temperature: float
    student_top_p: float
    teacher_temperature: float
    teacher_top_p: float
    gate: str = "top_k"  # a name of core.gates.GATES
    threshold: float = 0.0  # of the gates other than top_k

    def to_extra_args(self) -> dict[str, Any]:
        return {EXTRA_ARGS_KEY: asdict(self)}


@dataclass(frozen=True)
class Rows:
    """The parameters of a batch as tensors, one entry a row [B]."""

    seed: torch.Tensor
    top_k: torch.Tensor
    threshold: torch.Tensor
    student_temperature: torch.Tensor
    student_top_p: torch.Tensor
    teacher_temperature: torch.Tensor
    teacher_top_p: torch.Tensor

    def repeat(self, counts_B: torch.Tensor) -> Rows:
        """Rows of requests -> rows of their drafted tokens."""
        return Rows(**{name: value.repeat_interleave(counts_B) for name, value in vars(self).items()})


class RequestTable:
    """Parameters and traces by trace id. Shared by the sampler and the drafter of one worker."""

    def __init__(
        self, requests: dict[str, Any], device: torch.device, num_teacher_entries: int, loss_temperature: float
    ) -> None:
        self._requests = requests  # the model runner's own table: vLLM request id -> state
        self._device = device
        self._parts: dict[int, list[Trace]] = {}
        self._rows_of: tuple[tuple[str, ...], Rows] | None = None
        self.num_teacher_entries = num_teacher_entries
        self.loss_temperature = loss_temperature

    def params(self, request_id: str) -> RequestParams:
        """Raises KeyError for a request that was not made by this plugin: it would be sampled by no known rule."""
        extra_args = self._requests[request_id].sampling_params.extra_args or {}
        if EXTRA_ARGS_KEY not in extra_args:
            raise KeyError(
                f"request {request_id} has no '{EXTRA_ARGS_KEY}' sampling arguments; an SKD engine serves only "
                "requests that come through skd_plugin.rollout"
            )
        return RequestParams(**extra_args[EXTRA_ARGS_KEY])

    def rows(self, request_ids: Sequence[str]) -> Rows:
        key = tuple(request_ids)
        if self._rows_of is None or self._rows_of[0] != key:
            params = [self.params(request_id) for request_id in key]
            self._rows_of = (
                key,
                Rows(
                    seed=self._tensor([p.seed for p in params], torch.int64),
                    top_k=self._tensor([p.top_k for p in params], torch.int64),
                    threshold=self._tensor([p.threshold for p in params], torch.float32),
                    student_temperature=self._tensor([p.student_temperature for p in params], torch.float32),
                    student_top_p=self._tensor([p.student_top_p for p in params], torch.float32),
                    teacher_temperature=self._tensor([p.teacher_temperature for p in params], torch.float32),
                    teacher_top_p=self._tensor([p.teacher_top_p for p in params], torch.float32),
                ),
            )
        return self._rows_of[1]

    def record(self, request_id: str, part: Trace) -> None:
        self._parts.setdefault(self.params(request_id).trace_id, []).append(part)

    def take(self, trace_ids: Sequence[int]) -> list[Trace]:
        """Traces of finished requests, removed from the table. An id without a token has an empty trace."""
        taken = [self._parts.pop(trace_id, []) for trace_id in trace_ids]
        return [Trace.join(parts) if parts else Trace.empty(self.num_teacher_entries) for parts in taken]

    def clear(self) -> None:
        """Forget the traces of requests that were aborted and so will never be fetched."""
        self._parts.clear()

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
