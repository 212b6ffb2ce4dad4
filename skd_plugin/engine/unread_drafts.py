"""Drafts that nobody waits for before they are verified.

SKD knows the tokens of a step before it drafts the next ones, so vLLM could plan the next step, and make its inputs,
while a GPU drafts. Without asynchronous scheduling, in which a plan would not know these tokens, it waits for the
drafts first, twice: its bookkeeping fetches the step's tokens from the GPU, behind the drafts on the same stream; and
its scheduler is told each draft, of which it only wants the number. Here the bookkeeping has the tokens from ordinary
memory, the scheduler gets zeros, and drafts go to the next step's inputs on the device, as vLLM has it with
asynchronous scheduling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from skd_plugin.core.copies import to_device
from skd_plugin.engine.request_table import RequestTable

UNREAD = 0  # in a draft's place until it is on the device; vLLM takes -1 for a place without a draft


class Sampled(SamplerOutput):
    """A step's tokens, on the device and in ordinary memory."""

    def __init__(self, here_BL: torch.Tensor, device: torch.device) -> None:
        super().__init__(sampled_token_ids=to_device(here_BL, device), logprobs_tensors=None)
        self.here_BL = here_BL


class UnreadDrafts:
    """Takes the place of three methods of a model runner, whose sampler returns `Sampled`."""

    def __init__(self, runner: Any, table: RequestTable) -> None:
        self._runner, self._table = runner, table
        self._make_input_ids, self._keep_books = runner._prepare_input_ids, runner._bookkeeping_sync
        runner._prepare_input_ids = self._prepare_input_ids
        runner._bookkeeping_sync = self._bookkeeping_sync
        runner._get_draft_token_ids_cpu = self._numbers_alone
        if runner.device.type == "cuda":  # by which vLLM knows that its pinned memory may be written to again
            runner.prepare_inputs_event = torch.cuda.Event(blocking=True)

    def _bookkeeping_sync(self, scheduler_output: Any, sampler_output: Sampled, *others: Any) -> Any:
        here = SamplerOutput(sampled_token_ids=sampler_output.here_BL, logprobs_tensors=None)
        return self._keep_books(scheduler_output, here, *others)

    def _numbers_alone(self) -> tuple[list[list[int]], list[str]]:
        """For the scheduler's `update_draft_token_ids`."""
        request_ids = self._runner._draft_token_req_ids
        return [[UNREAD] * self._runner._draft_token_ids.shape[1] for _ in request_ids], request_ids

    def _prepare_input_ids(
        self, scheduler_output: Any, num_reqs: int, total_num_scheduled_tokens: int, cu_num_tokens: np.ndarray
    ) -> None:
        """Args: cu_num_tokens: int [B], tokens that the step reads of each request and those before it."""
        self._make_input_ids(scheduler_output, num_reqs, total_num_scheduled_tokens, cu_num_tokens)
        now = self._table.scheduled(self._runner.input_batch.req_ids)
        if any(now.counts):
            ends_B = torch.from_numpy(cu_num_tokens[: len(now.counts)])
            entry_N = (ends_B - now.counts_B)[now.request_N] + now.place_N  # a request's drafts come last
            draft_N = self._table.drafts(now)
            self._runner.input_ids.gpu[to_device(entry_N, draft_N.device)] = draft_N.int()
