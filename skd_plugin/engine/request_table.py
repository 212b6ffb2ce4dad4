"""What the engine's worker knows of each request in flight: how to sample it, and its trace so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import torch

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
    top_k: int  # K of the gate; >= vocabulary keeps every proposal, 0 none
    student_temperature: float
    student_top_p: float
    teacher_temperature: float
    teacher_top_p: float
    gate: str = "top_k"  # a name of core.gates.GATES
    threshold: float = 0.0  # of the gates other than top_k
    top_k_decay_len: int = 0  # response tokens over which K falls to 1; 0: K stays
    write_back: bool = True  # False: a rejected proposal stays in the text and is only flagged
    forced_ids: list[int] | None = None  # a reference: every token of it is proposed and kept

    def to_extra_args(self) -> dict[str, Any]:
        return {EXTRA_ARGS_KEY: asdict(self)}


@dataclass(frozen=True)
class Rows:
    """The parameters of a batch as tensors, one entry a row [B]."""

    seed: torch.Tensor
    prompt_len: torch.Tensor
    top_k: torch.Tensor
    top_k_decay_len: torch.Tensor
    threshold: torch.Tensor
    student_temperature: torch.Tensor
    student_top_p: torch.Tensor
    teacher_temperature: torch.Tensor
    teacher_top_p: torch.Tensor
    write_back: torch.Tensor
    is_forced: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[RequestParams], device: torch.device) -> Rows:
        kinds = {int: torch.int64, float: torch.float32, bool: torch.bool}
        types = get_type_hints(RequestParams)
        named = {n: (types[n], [getattr(p, n) for p in params]) for n in cls.__dataclass_fields__ if n in types}
        named["is_forced"] = bool, [p.forced_ids is not None for p in params]
        return cls(**{n: torch.tensor(values, dtype=kinds[t], device=device) for n, (t, values) in named.items()})

    def repeat(self, counts_B: torch.Tensor) -> Rows:
        """Rows of requests -> rows of their drafted tokens."""
        return Rows(**{name: value.repeat_interleave(counts_B) for name, value in vars(self).items()})


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
        self._batch_of: tuple[tuple[str, ...], tuple[Rows, torch.Tensor]] | None = None
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
        return RequestParams(**extra_args[EXTRA_ARGS_KEY])

    def rows(self, request_ids: Sequence[str]) -> Rows:
        return self._batch(request_ids)[0]

    def forced_ids(self, request_ids: Sequence[str]) -> torch.Tensor:
        """References, int64 [B, F] as `references.padded` makes them."""
        return self._batch(request_ids)[1]

    def _batch(self, request_ids: Sequence[str]) -> tuple[Rows, torch.Tensor]:
        key = tuple(request_ids)
        if self._batch_of is None or self._batch_of[0] != key:
            params = [self.params(request_id) for request_id in key]
            forced = references.padded([p.forced_ids for p in params], self._device)
            self._batch_of = key, (Rows.of(params, self._device), forced)
        return self._batch_of[1]

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
