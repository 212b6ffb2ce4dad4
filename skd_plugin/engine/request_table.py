"""What the engine's worker knows of each request in flight: how to sample it, and what waits for the next step.

Shapes: B requests, L draft length, V vocabulary, N drafted tokens of all requests, F tokens of the longest reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from skd_plugin.core.hand_over import Legs
from skd_plugin.core.sampling import SettingRows
from skd_plugin.core.trace import NOTHING, Trace
from skd_plugin.engine import references
from skd_plugin.engine.request import RequestParams
from skd_plugin.engine.student_prompt import StudentPrompts


@dataclass
class InFlight:
    """One request, from its first step to its last."""

    params: RequestParams
    proposed_logp_LV: torch.Tensor | None = None  # log q of the student's proposals that wait for the teacher
    leg: tuple[int, int] = (0, 0)  # where the response stands among the teacher's legs: `Legs` of it
    emitted: int = 0  # tokens of the response
    last_id: int = NOTHING  # the last of them


class RequestRows(NamedTuple):
    """The parameters of a batch, one entry a request."""

    params: list[RequestParams]
    seed_B: torch.Tensor  # int64
    prompt_len_B: torch.Tensor  # int64, of the student's prompts
    shift_B: torch.Tensor  # int64, tokens that the teacher's prompts have more
    student_prompts: StudentPrompts | None  # where a student's prompt is not the teacher's
    is_forced_B: torch.Tensor  # bool
    forced_BF: torch.Tensor  # references, as `references.padded` makes them
    settings: SettingRows
    hands_over: bool  # some request has legs of the teacher


class RequestTable:
    """Requests by vLLM's ids, traces by ours. Shared by the worker, the sampler and the drafter of one worker."""

    def __init__(
        self,
        states: Mapping[str, Any],
        device: torch.device,
        teacher_top_k: int,
        vocab_size: int,
    ) -> None:
        """
        Args:
            states: the model runner's own table: vLLM's request id -> its state.
            vocab_size: ids that both models have.
        """
        self.vocab_size = vocab_size
        self.student_version = 0  # updates that the student has had
        self._states = states
        self._device = device
        self._teacher_top_k = teacher_top_k
        self._in_flight: dict[str, InFlight] = {}
        self._parts: dict[int, list[Trace]] = {}  # of each trace, a part a step; they stay until they are fetched
        self._fetched: set[int] = set()  # traces of requests in flight that nobody will fetch again
        self._fault: Exception | None = None  # of a step; whoever fetches traces next is told
        self._latest: tuple[tuple[str, ...], RequestRows] | None = None

    def rows(self, request_ids: Sequence[str]) -> RequestRows:
        """The parameters of a batch; made once where one step after the other asks for the same.

        Raises:
            KeyError: a request was not made by this plugin.
        """
        key = tuple(request_ids)
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self._rows([self._of(request_id).params for request_id in key])
        return self._latest[1]

    def keep_proposals(self, request_ids: Sequence[str], logp_BLV: torch.Tensor) -> None:
        """log q of the tokens that the student has proposed. They wait for the teacher, and not always for the next
        step: a request for which that has no room keeps its drafts, but vLLM forgets their distributions.
        """
        for request_id, logp_LV in zip(request_ids, logp_BLV, strict=True):
            self._of(request_id).proposed_logp_LV = logp_LV

    def take_proposals(self, request_ids: Sequence[str], counts: Sequence[int]) -> torch.Tensor:
        """log q [N, V] of the proposals that are verified now, N the sum of the counts; taken once each.

        Raises:
            RuntimeError: vLLM scheduled drafts that the student did not propose; their distribution is unknown.
        """
        taken = []
        for request_id, count in zip(request_ids, counts, strict=True):
            if not count:
                continue
            request = self._of(request_id)
            if request.proposed_logp_LV is None:
                raise RuntimeError(
                    f"vLLM scheduled draft tokens that the student did not propose, for request {request_id}: the "
                    "engine's max_model_len is too small for its drafts. Start it with the arguments of "
                    "skd_plugin.engine.arguments."
                )
            taken.append(request.proposed_logp_LV[:count])
            request.proposed_logp_LV = None
        return torch.cat(taken)

    def legs(self, request_ids: Sequence[str]) -> Legs:
        """Where the responses stand before their next token."""
        states = torch.tensor([self._of(request_id).leg for request_id in request_ids], device=self._device)
        return Legs(*states.unbind(1))

    def keep_legs(self, request_ids: Sequence[str], counts: Sequence[int], after_B: Legs) -> None:
        """Where those that have emitted tokens now stand. A token that is emitted once more, behind a preemption,
        moves nothing.
        """
        for request_id, count, left, begun in zip(
            request_ids, counts, *map(torch.Tensor.tolist, after_B), strict=True
        ):
            if count:
                self._of(request_id).leg = left, begun

    def record(self, trace_ids: Sequence[int], counts: Sequence[int], tokens: Trace) -> None:
        """Deals out the tokens of a step: the first counts[0] of them go to the first trace, and so on. Those of a
        request that is cut off while it goes on here (a stop string, an executor that gave up) go nowhere.
        """
        # Before an update vLLM preempts what is in flight: no draft of an older version is left to be verified.
        tokens = replace(tokens, student_version=torch.full((len(tokens),), self.student_version, dtype=torch.int32))
        start = 0
        for trace_id, count in zip(trace_ids, counts, strict=True):
            if count and trace_id not in self._fetched:
                self._parts.setdefault(trace_id, []).append(tokens.slice(start, start + count))
            start += count

    def note_emitted(self, request_ids: Sequence[str], blocks: Sequence[Sequence[int]]) -> None:
        """The tokens that a step gave each request; some got none."""
        for request_id, block in zip(request_ids, blocks, strict=True):
            if block:
                request = self._of(request_id)
                request.emitted, request.last_id = request.emitted + len(block), block[-1]

    def last_token(self, request_id: str, place: int) -> int:
        """The last token of a response, which stands at `place` in it, and is to be emitted once more.

        At any other place it would be a token that no student has proposed; `take` raises that error.
        """
        request = self._of(request_id)
        if place != request.emitted - 1:
            self._fault = RuntimeError(
                f"vLLM asked for token {place} of a response without drafts for it: a token of the teacher would "
                "stand there that no student proposed. Its scheduler is not skd_plugin's, or a newer vLLM works in "
                "another way; run pytest tests/contract"
            )
            return 0
        return request.last_id

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops requests that have ended, however they did; their traces stay."""
        for request_id in request_ids:
            request = self._in_flight.pop(request_id, None)
            if request is not None:
                self._fetched.discard(request.params.trace_id)
            self._latest = None

    def finite(self, logits_NV: torch.Tensor, model: str) -> torch.Tensor:
        """The logits; where no distribution follows from them, numbers to go on with. `take` raises the error: raised
        here it would take the engine down, and nobody would read why.
        """
        if bool(logits_NV.amax(-1).isfinite().all()):
            return logits_NV
        self._fault = FloatingPointError(
            f"the {model}'s logits are NaN or infinite, so nothing can be sampled from them. During training: the "
            "student has diverged; go on from the last checkpoint with a lower learning rate. At the start: the "
            "model's weights are broken, or its dtype overflows"
        )
        return torch.zeros_like(logits_NV)

    def take(self, trace_ids: Sequence[int]) -> list[Trace]:
        """Traces of finished requests, removed from the table. An id without a token has an empty trace.

        Raises:
            FloatingPointError: logits were not finite since the last call.
            RuntimeError: a token was to come from no proposal.
        """
        taken = [self._parts.pop(trace_id, []) for trace_id in trace_ids]
        in_flight = {request.params.trace_id for request in self._in_flight.values()}
        self._fetched |= in_flight.intersection(trace_ids)
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        return [Trace.join(parts) if parts else Trace.empty(self._teacher_top_k) for parts in taken]

    def _of(self, request_id: str) -> InFlight:
        if request_id not in self._in_flight:
            extra_args = self._states[request_id].sampling_params.extra_args
            self._in_flight[request_id] = InFlight(RequestParams.from_extra_args(extra_args))
        return self._in_flight[request_id]

    def _rows(self, params: list[RequestParams]) -> RequestRows:
        def column(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        return RequestRows(
            params=params,
            seed_B=column([p.seed for p in params], torch.int64),
            prompt_len_B=column([p.prompt_len for p in params], torch.int64),
            shift_B=column([p.shift for p in params], torch.int64),
            student_prompts=StudentPrompts.of(params),
            is_forced_B=column([p.forced_ids is not None for p in params], torch.bool),
            forced_BF=references.padded([p.forced_ids for p in params], self._device),
            settings=SettingRows.of([p.settings for p in params], self._device),
            hands_over=any(p.settings.hand_over_len for p in params),
        )
