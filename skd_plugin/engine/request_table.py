"""What the engine's worker knows of each request in flight: how to sample it, and its trace so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from skd_plugin.core.sampling import SamplingSettings, SettingRows
from skd_plugin.core.trace import Trace
from skd_plugin.engine import references

EXTRA_ARGS_KEY = "skd"  # the entry of vLLM's SamplingParams.extra_args that carries a `RequestParams`


@dataclass(frozen=True)
class RequestParams:
    """How one request is sampled."""

    trace_id: int  # names the trace when it is fetched; unique in the engine
    prompt_len: int  # tokens
    first_token: int  # last token of the prompt, forced as the first output so that the student proposes what follows
    seed: int  # of the request's own random stream
    settings: SamplingSettings
    forced_ids: list[int] | None = None  # a reference: every token of it is proposed and kept

    def to_extra_args(self) -> dict[str, Any]:
        return {EXTRA_ARGS_KEY: asdict(self)}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any]) -> RequestParams:
        given = extra_args[EXTRA_ARGS_KEY]
        return cls(**{**given, "settings": SamplingSettings(**given["settings"])})


class RequestRows(NamedTuple):
    """The parameters of a batch as tensors, one entry a request [B]."""

    seed_B: torch.Tensor  # int64
    prompt_len_B: torch.Tensor  # int64
    is_forced_B: torch.Tensor  # bool
    forced_BF: torch.Tensor  # references, as `references.padded` makes them
    settings: SettingRows


class RequestTable:
    """Parameters and traces by trace id. Shared by the sampler and the drafter of one worker."""

    def __init__(
        self,
        requests: dict[str, Any],
        device: torch.device,
        num_teacher_entries: int,
        loss_temperature: float,
        vocab_size: int,
    ) -> None:
        self._requests = requests  # the model runner's own table: vLLM request id -> state
        self._device = device
        self._parts: dict[int, list[Trace]] = {}
        self._fault: str | None = None
        self._batch: tuple[tuple[str, ...], RequestRows] | None = None
        self.num_teacher_entries = num_teacher_entries
        self.loss_temperature = loss_temperature
        self.vocab_size = vocab_size  # ids that both models have

    def params(self, request_id: str) -> RequestParams:
        """Raises KeyError for a request that was not made by this plugin: it would be sampled by no known rule."""
        extra_args = self._requests[request_id].sampling_params.extra_args or {}
        if EXTRA_ARGS_KEY not in extra_args:
            raise KeyError(
                f"request {request_id} has no '{EXTRA_ARGS_KEY}' sampling arguments; an SKD engine serves only "
                "requests that come through skd_plugin.engine"
            )
        return RequestParams.from_extra_args(extra_args)

    def rows(self, request_ids: Sequence[str]) -> RequestRows:
        key = tuple(request_ids)
        if self._batch is None or self._batch[0] != key:
            params = [self.params(request_id) for request_id in key]
            rows = RequestRows(
                seed_B=torch.tensor([p.seed for p in params], dtype=torch.int64, device=self._device),
                prompt_len_B=torch.tensor([p.prompt_len for p in params], dtype=torch.int64, device=self._device),
                is_forced_B=torch.tensor(
                    [p.forced_ids is not None for p in params], dtype=torch.bool, device=self._device
                ),
                forced_BF=references.padded([p.forced_ids for p in params], self._device),
                settings=SettingRows.of([p.settings for p in params], self._device),
            )
            self._batch = key, rows
        return self._batch[1]

    def record(self, request_id: str, part: Trace) -> None:
        self._parts.setdefault(self.params(request_id).trace_id, []).append(part)

    def finite(self, logits_NV: torch.Tensor, model: str) -> torch.Tensor:
        """The logits; where no distribution follows from them, numbers to go on with. `take` raises the error: raised
        here it would take the engine down, and nobody would read why.
        """
        if bool(logits_NV.amax(-1).isfinite().all()):
            return logits_NV
        self._fault = (
            f"the {model}'s logits are NaN or infinite, so nothing can be sampled from them. During training: the "
            "student has diverged; go on from the last checkpoint with a lower learning rate. At the start: the "
            "model's weights are broken, or its dtype overflows"
        )
        return torch.zeros_like(logits_NV)

    def take(self, trace_ids: Sequence[int]) -> list[Trace]:
        """Traces of finished requests, removed from the table. An id without a token has an empty trace.

        Raises:
            FloatingPointError: logits were not finite since the last call.
        """
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise FloatingPointError(fault)
        taken = [self._parts.pop(trace_id, []) for trace_id in trace_ids]
        return [Trace.join(parts) if parts else Trace.empty(self.num_teacher_entries) for parts in taken]

    def clear(self) -> None:
        """Forget the traces of requests that were aborted and so will never be fetched."""
        self._parts.clear()
