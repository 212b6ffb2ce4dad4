"""What the engine's worker knows of each request in flight: how to sample it, and what waits for the next step.

Shapes: B requests, L draft length, V vocabulary, N drafted tokens of all requests, F tokens of the longest reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple

import torch

from skd_plugin.core.clock import clock_on
from skd_plugin.core.copies import to_device
from skd_plugin.core.gates import GATES
from skd_plugin.core.hand_over import Legs
from skd_plugin.core.sampling import SettingRows
from skd_plugin.core.trace import NOTHING
from skd_plugin.core.verify import Group
from skd_plugin.engine import references
from skd_plugin.engine.recorder import Part, Record
from skd_plugin.engine.request import RequestParams
from skd_plugin.engine.student_prompt import StudentPrompts


@dataclass
class InFlight:
    """One request, from its first step to its last."""

    params: RequestParams
    progress: Sequence[int] = (0, NOTHING, 0, 0)  # a column of `RequestRows.progress_4B`


class Proposed(NamedTuple):
    """What the student has proposed to B requests together, and its logits there."""

    logits_LBV: torch.Tensor
    token_BL: torch.Tensor


class Waiting(NamedTuple):
    """A request's proposals, which wait for the teacher."""

    among: Proposed
    row: int  # the request's place among these B


@dataclass(frozen=True)
class Scheduled:
    """The drafts of the student that a step verifies. Tensors are int64 and in ordinary memory."""

    request_ids: list[str]
    counts: list[int]  # of each request, 0 of one without
    counts_B: torch.Tensor  # the same
    request_N: torch.Tensor  # the request of each draft, its place in the batch
    place_N: torch.Tensor  # the draft's place among those of its request
    calls: list[Proposed]  # of the drafter, from which they are
    call_N: torch.Tensor  # of each draft
    row_N: torch.Tensor  # its request's row in that

    @classmethod
    def of(cls, request_ids: Sequence[str], counts: Sequence[int], waiting: Mapping[str, Waiting]) -> Scheduled:
        """Raises RuntimeError: vLLM scheduled drafts that the student did not propose."""
        calls: dict[int, Proposed] = {}
        numbers: dict[int, int] = {}  # of the same, in their order
        call_B, row_B = [0] * len(counts), [0] * len(counts)
        for place, (request_id, count) in enumerate(zip(request_ids, counts, strict=True)):
            if not count:
                continue
            if request_id not in waiting:
                raise RuntimeError(
                    f"vLLM scheduled draft tokens that the student did not propose, for request {request_id}: the "
                    "engine's max_model_len is too small for its drafts. Start it with the arguments of "
                    "skd_plugin.engine.arguments."
                )
            among, row_B[place] = waiting[request_id]
            calls[id(among)] = among
            call_B[place] = numbers.setdefault(id(among), len(numbers))
        counts_B = torch.tensor(counts)
        request_N = torch.arange(len(counts)).repeat_interleave(counts_B, output_size=sum(counts))
        return cls(
            request_ids=[*request_ids],
            counts=[*counts],
            counts_B=counts_B,
            request_N=request_N,
            place_N=torch.arange(len(request_N)) - (counts_B.cumsum(0) - counts_B)[request_N],
            calls=[*calls.values()],
            call_N=torch.tensor(call_B)[request_N],
            row_N=torch.tensor(row_B)[request_N],
        )


@dataclass(frozen=True)
class RequestRows:
    """The parameters of a batch, one entry a request, and what happened while the batch was this one."""

    request_ids: tuple[str, ...]
    params: list[RequestParams]
    seed_B: torch.Tensor  # int64
    prompt_len_B: torch.Tensor  # int64, of the student's prompts
    shift_B: torch.Tensor  # int64, tokens that the teacher's prompts have more
    student_prompts: StudentPrompts | None  # where a student's prompt is not the teacher's
    forced_BF: torch.Tensor | None  # references, as `references.padded` makes them; None: there are none
    settings: SettingRows
    row_of: dict[int, int]  # trace -> the row of its request
    # int64, in ordinary memory: tokens of the response, the last of them, and where it stands among the teacher's legs
    progress_4B: torch.Tensor
    # Of each step: its tokens, and the first of each request's, with their number behind them.
    steps: list[tuple[Part, list[int]]] = field(default_factory=list)

    def note_emitted(self, token_BL: torch.Tensor) -> None:
        """The tokens that a step gave each request, in ordinary memory; some got none."""
        count_B = (token_BL != NOTHING).sum(1)
        last_B = token_BL.gather(1, (count_B - 1).clamp_min(0)[:, None]).squeeze(1)
        self.progress_4B[0] += count_B
        self.progress_4B[1] = torch.where(count_B > 0, last_B, self.progress_4B[1])

    @property
    def legs(self) -> Legs:
        """Where the responses stand before their next token."""
        return Legs(*self.progress_4B[2:])

    @cached_property
    def hands_over(self) -> bool:
        """Whether some request has legs of the teacher."""
        return any(params.settings.hand_over_len for params in self.params)

    @cached_property
    def settings_here(self) -> SettingRows:
        """The settings once more, in ordinary memory."""
        return SettingRows.of([params.settings for params in self.params], "cpu")

    @cached_property
    def _gates(self) -> list[str | None]:
        """The gate of each request; None of one whose text is given."""
        return [None if params.forced_ids is not None else params.settings.gate for params in self.params]

    def groups(self, request_N: torch.Tensor) -> list[Group]:
        """Which gate judges which proposals. Args: request_N: the request of each, in ordinary memory."""
        kinds = list(dict.fromkeys(self._gates))
        gates = [None if name is None else GATES[name] for name in kinds]
        if len(gates) == 1:
            return [Group(gates[0], None)]
        kind_N = torch.tensor([kinds.index(name) for name in self._gates])[request_N]
        return [Group(gate, kind_N == kind) for kind, gate in enumerate(gates)]


class RequestTable:
    """Requests by vLLM's ids, traces by ours. Shared by the worker, the sampler and the drafter of one worker."""

    def __init__(
        self,
        states: Mapping[str, Any],
        device: torch.device,
        teacher_top_k: int,
        vocab_size: int,
        end_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            states: the model runner's own table: vLLM's request id -> its state.
            vocab_size: ids that both models have.
            end_ids: of them those that end a turn, as one event; none: each is itself.
        """
        self.vocab_size = vocab_size
        self.ends_E = torch.tensor(end_ids, device=device) if end_ids else None
        self.student_version = 0  # updates that the student has had
        self.clock = clock_on(device)
        self._states = states
        self._device = device
        self._teacher_top_k = teacher_top_k
        self._in_flight: dict[str, InFlight] = {}
        self._to_verify: Mapping[str, Sequence[int]] = {}  # drafts of this step
        self._scheduled: Scheduled | None = None  # the same
        self._waiting: dict[str, Waiting] = {}
        self._batches: dict[int, list[RequestRows]] = {}  # in which each trace that was not fetched has taken part
        self._last_part: Part | None = None
        self._fetched: set[int] = set()  # traces of requests in flight that nobody will fetch again
        self._fault: Exception | None = None  # of a step; whoever fetches traces next is told
        self._latest: RequestRows | None = None

    def rows(self, request_ids: Sequence[str]) -> RequestRows:
        """The parameters of a batch; made once where one step after the other asks for the same.

        Raises:
            KeyError: a request was not made by this plugin.
        """
        key = tuple(request_ids)
        if self._latest is None or self._latest.request_ids != key:
            self._store_progress()
            self._latest = self._rows(key)
        return self._latest

    def _store_progress(self) -> None:
        """Writes down how far the requests of the present batch have come, before there is another."""
        if self._latest is not None:
            for request_id, progress in zip(
                self._latest.request_ids, self._latest.progress_4B.T.tolist(), strict=True
            ):
                if request_id in self._in_flight:
                    self._in_flight[request_id].progress = progress
            self._latest = None

    def schedule(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Args: drafts: that a step verifies, by request, from vLLM's scheduler: on a GPU the sampler would have to
        wait for them.
        """
        self._to_verify, self._scheduled = drafts, None

    def scheduled(self, request_ids: Sequence[str]) -> Scheduled:
        """What this step verifies of these requests; made once where it is asked for again.

        vLLM pads a request that has one token to read and joins a running batch with placeholder drafts of -1.

        Raises:
            RuntimeError: it scheduled drafts that the student did not propose; their distribution is unknown.
        """
        if self._scheduled is None or self._scheduled.request_ids != request_ids:
            drafts = [self._to_verify.get(request_id, ()) for request_id in request_ids]
            counts = [len(own) if own and own[0] >= 0 else 0 for own in drafts]
            self._scheduled = Scheduled.of(request_ids, counts, self._waiting)
        return self._scheduled

    def keep_proposals(self, request_ids: Sequence[str], logits_LBV: torch.Tensor, token_BL: torch.Tensor) -> None:
        """Tokens that the student has proposed, with its logits there. They wait for the teacher, and not always for
        the next step: a request for which that has no room keeps its drafts, but vLLM forgets their distributions.
        """
        proposed = Proposed(logits_LBV, token_BL)
        self._waiting.update(zip(request_ids, map(Waiting, repeat(proposed), range(len(request_ids))), strict=True))

    def drafts(self, now: Scheduled) -> torch.Tensor:
        """Those that are verified now [N], on the device."""
        stride_C = torch.tensor([call.token_BL.shape[1] for call in now.calls])
        at_N = now.row_N * stride_C[now.call_N] + now.place_N
        tokens, order_N = self._gathered([call.token_BL.flatten() for call in now.calls], now.call_N, at_N)
        return tokens[to_device(order_N, self._device)]

    def take_proposals(self, now: Scheduled) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's logits [S, V] where it has made the drafts that are verified now, and the row of each draft
        in them, int64 [N] in ordinary memory. Each request's are taken once.
        """
        for request_id, count in zip(now.request_ids, now.counts, strict=True):
            if count:
                del self._waiting[request_id]
        stride_C = torch.tensor([call.logits_LBV.shape[1] for call in now.calls])
        at_N = now.place_N * stride_C[now.call_N] + now.row_N
        return self._gathered([call.logits_LBV.flatten(0, 1) for call in now.calls], now.call_N, at_N)

    def _gathered(
        self, rows_of_calls: list[torch.Tensor], call_N: torch.Tensor, at_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Several tensors as one, and the place there of each row that was asked for, int64 [N].

        Args:
            call_N: the tensor in which each is.
            at_N: and its place in that.
        """
        if len(rows_of_calls) == 1:
            return rows_of_calls[0], at_N
        copied, order = [], []  # some have waited longer than others: only here are rows copied
        for number, rows in enumerate(rows_of_calls):
            own = (call_N == number).nonzero().squeeze(1)
            copied.append(rows[to_device(at_N[own], self._device)])
            order.append(own)
        return torch.cat(copied), torch.cat(order).argsort()

    def record(self, batch: RequestRows, counts: Sequence[int], part: Part) -> None:
        """The tokens of a step: the first counts[0] of them are of the first request of the batch, and so on."""
        if self._last_part is not None:
            self._last_part.settle()
        self._last_part = part
        if not batch.steps:
            for trace_id in batch.row_of.keys() - self._fetched:
                self._batches.setdefault(trace_id, []).append(batch)
        batch.steps.append((part, [0, *accumulate(counts)]))

    def _parts(self, trace_id: int, batches: Iterable[RequestRows]) -> list[tuple[Part, int, int]]:
        """Where the tokens of a response are, in their order."""
        found = []
        for batch in batches:
            row = batch.row_of[trace_id]
            found += [(part, starts[row], starts[row + 1]) for part, starts in batch.steps]
        return [(part, start, end) for part, start, end in found if end > start]

    def last_token(self, batch: RequestRows, row: int, place: int) -> int:
        """The last token of the response of a row, which stands at `place` in it, and is to be emitted once more.

        At any other place it would be a token that no student has proposed; `take` raises that error.
        """
        emitted, last_id = batch.progress_4B[:2, row].tolist()
        if place != emitted - 1:
            self._fault = RuntimeError(
                f"vLLM asked for token {place} of a response without drafts for it: a token of the teacher would "
                "stand there that no student proposed. Its scheduler is not skd_plugin's, or a newer vLLM works in "
                "another way; run pytest tests/contract"
            )
            return 0
        return last_id

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops requests that have ended, however they did; their traces stay."""
        self._store_progress()
        for request_id in request_ids:
            request = self._in_flight.pop(request_id, None)
            self._waiting.pop(request_id, None)
            if request is not None:
                self._fetched.discard(request.params.trace_id)

    def take(self, trace_ids: Sequence[int]) -> list[Record]:
        """Records of requests, removed from the table. An id without a token has an empty one. What a request that
        is cut off while it goes on here (a stop string, an executor that gave up) emits from now on goes nowhere.

        Raises:
            FloatingPointError: logits were not finite.
            RuntimeError: a token was to come from no proposal.
        """
        taken = [self._parts(trace_id, self._batches.pop(trace_id, ())) for trace_id in trace_ids]
        in_flight = {request.params.trace_id for request in self._in_flight.values()}
        self._fetched |= in_flight.intersection(trace_ids)
        records = [Record.of(parts, self._teacher_top_k) for parts in taken]
        fault, self._fault = self._fault or not_finite(records), None
        if fault is not None:
            raise fault
        return records

    def _of(self, request_id: str) -> InFlight:
        if request_id not in self._in_flight:
            extra_args = self._states[request_id].sampling_params.extra_args
            self._in_flight[request_id] = InFlight(RequestParams.from_extra_args(extra_args))
        return self._in_flight[request_id]

    def _rows(self, request_ids: tuple[str, ...]) -> RequestRows:
        requests = [self._of(request_id) for request_id in request_ids]
        params = [request.params for request in requests]
        forced = [p.forced_ids for p in params]

        def column(values: list[int]) -> torch.Tensor:
            return to_device(torch.tensor(values), self._device)

        return RequestRows(
            request_ids=request_ids,
            params=params,
            seed_B=column([p.seed for p in params]),
            prompt_len_B=column([p.prompt_len for p in params]),
            shift_B=column([p.shift for p in params]),
            student_prompts=StudentPrompts.of(params),
            forced_BF=None if forced == [None] * len(forced) else references.padded(forced, self._device),
            settings=SettingRows.of([p.settings for p in params], self._device),
            row_of={p.trace_id: row for row, p in enumerate(params)},
            progress_4B=torch.tensor([*chain(*(request.progress for request in requests))]).view(-1, 4).T.contiguous(),
        )


def not_finite(records: Iterable[Record]) -> FloatingPointError | None:
    """What to say of records in which a model's log-probabilities are no numbers. The engine samples on from such
    logits: raised there, the error would take it down, and nobody would read why.
    """
    for record in records:
        for model in ("student", "teacher"):
            if bool(record.figure(f"{model}_logp").isnan().any()):
                return FloatingPointError(
                    f"the {model}'s logits are NaN or infinite, so nothing can be sampled from them. During training: "
                    "the student has diverged; go on from the last checkpoint with a lower learning rate. At the "
                    "start: the model's weights are broken, or its dtype overflows"
                )
    return None
