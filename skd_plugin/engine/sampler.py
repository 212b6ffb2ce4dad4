"""SKD's rule in place of vLLM's rejection sampler: the teacher is the engine's model, the student its draft model.

Shapes: N drafted tokens of the batch, B requests, R of them without a draft, L draft length, V vocabulary, M tokens
emitted, S rows of the teacher's logits, J width of the teacher, F tokens of the longest reference.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from skd_plugin.core.gates import GATES, Proposals, Verdict, assemble_block, judge
from skd_plugin.core.hand_over import Legs, hand_over
from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.engine.recorder import Recorder
from skd_plugin.engine.request_table import RequestRows, RequestTable


class SKDSampler:
    """Takes the place of the model runner's `_sample`, the one call (in its `sample_tokens`) through which every token
    of the engine goes.

    It returns the token ids in the runner's own form, [B, L + 1] with -1 for "no token", as `_bookkeeping_sync` and
    the rejection sampler's `parse_output` read them. A fully kept block is returned without a bonus token; to the
    scheduler's `update_from_output` it looks as if the last draft had been rejected and replaced by itself, so its
    bookkeeping of computed tokens stays right.
    """

    def __init__(
        self, runner: Any, table: RequestTable, recorder: Recorder | None, hidden_SJ: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            recorder: None: no trace is kept.
            hidden_SJ: what the teacher's head made the logits of, row by row; a sampler that has it is one step's.
        """
        self._runner, self._table, self._recorder = runner, table, recorder
        self._hidden_SJ = hidden_SJ

    def __call__(self, logits: torch.Tensor, metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        logits = self._table.finite(logits[:, : self._table.vocab_size], "teacher")
        batch = self._table.rows(self._runner.input_batch.req_ids)
        num_requests = len(batch.params)
        scheduled = [0] * num_requests if metadata is None else metadata.num_draft_tokens
        # vLLM pads a request that has one token to read and joins a running batch with placeholder drafts of -1.
        real = [] if metadata is None else [token >= 0 for token in metadata.draft_token_ids.tolist()]
        first = [0, *accumulate(scheduled)]
        counts = [sum(real[start : start + count]) for start, count in zip(first, scheduled, strict=False)]
        width = 1 if metadata is None else self._runner.num_spec_tokens + 1
        token_BL = torch.full((num_requests, width), NOTHING, dtype=torch.int32, device=logits.device)
        if any(counts):
            token_BL = self._verify(batch, logits, metadata, counts)
        undrafted = [row for row, count in enumerate(counts) if not count]
        if undrafted:
            token_BL[undrafted, 0] = self._undrafted(batch, undrafted)
        return SamplerOutput(sampled_token_ids=token_BL, logprobs_tensors=None)

    def _verify(
        self, batch: RequestRows, logits: torch.Tensor, metadata: SpecDecodeMetadata, counts: list[int]
    ) -> torch.Tensor:
        """Tokens [B, L + 1] of the requests with drafts; rows without stay empty."""
        real = metadata.draft_token_ids >= 0  # one entry a draft, request by request: _calc_spec_decode_metadata
        counts_B = torch.tensor(counts, device=logits.device)
        logits_rows_N = metadata.target_logits_indices[real]
        draft_N = metadata.draft_token_ids[real].long()
        ids = self._runner.input_batch.req_ids
        request_N = torch.arange(len(counts_B), device=logits.device).repeat_interleave(counts_B)
        place_N = torch.arange(len(draft_N), device=logits.device) - (counts_B.cumsum(0) - counts_B)[request_N]
        proposals = Proposals(
            draft_N=draft_N,
            teacher_logits_NV=logits[logits_rows_N].float(),
            student_logp_NV=self._table.take_proposals(ids, counts),
            position_N=self._lengths(batch)[request_N] + place_N,
            seed_N=batch.seed_B[request_N],
            prompt_len_N=batch.prompt_len_B[request_N],
            settings=batch.settings.repeat(counts_B),
        )
        verdict = _judge(proposals, request_N, batch)
        if batch.hands_over:
            verdict, after_N = hand_over(proposals, verdict, self._table.legs(ids), request_N, place_N)

        def to_block(value_N: torch.Tensor) -> torch.Tensor:
            shape = (len(counts_B), self._runner.num_spec_tokens + 1)
            return value_N.new_zeros(shape).index_put_((request_N, place_N), value_N)

        kept_N = verdict.token_N == draft_N
        token_BL = assemble_block(to_block(draft_N), to_block(kept_N), to_block(verdict.token_N), counts_B)
        blocks = [[token for token in block if token != NOTHING] for block in token_BL.tolist()]
        emitted = list(map(len, blocks))
        self._table.note_emitted(ids, blocks)
        if batch.hands_over:
            last_B = (counts_B.cumsum(0) - counts_B + counts_B.new_tensor(emitted) - 1).clamp_min(0)
            self._table.keep_legs(ids, counts, Legs(*(state_N[last_B] for state_N in after_N)))
        if self._recorder is None:
            return token_BL.to(torch.int32)
        emitted_M = (token_BL[request_N, place_N] != NOTHING).nonzero().squeeze(1)
        tokens = self._recorder.drafted(
            verdict.token_N[emitted_M],
            verdict.source_N[emitted_M],
            draft_M=draft_N[emitted_M],
            rank_M=proposals.rank_N[emitted_M],
            student_logp_MV=proposals.student_logp_NV[emitted_M],
            teacher_logp_MV=proposals.teacher_logits_NV[emitted_M].log_softmax(-1),
            teacher_hidden_MJ=self._hidden(logits_rows_N[emitted_M]),
        )
        self._table.record([params.trace_id for params in batch.params], emitted, tokens)
        return token_BL.to(torch.int32)

    def _undrafted(self, batch: RequestRows, rows: list[int]) -> torch.Tensor:
        """Tokens [R] of the requests that bring no draft. They are known: the end of the prompt, or the last token of
        a response that goes on after a preemption (engine/scheduler.py).
        """
        runner, position_B = self._runner, self._lengths(batch).tolist()
        known = []
        for row in rows:
            request_id, params = runner.input_batch.req_ids[row], batch.params[row]
            if runner.discard_request_mask.np[row]:
                known.append(params.first_token)  # not yet read to its end: the runner throws this token away
            elif position_B[row] < params.prompt_len:
                known.append(params.first_token)
            else:
                known.append(self._table.last_token(request_id, position_B[row] - params.prompt_len))
        return torch.tensor(known, dtype=torch.int32, device=runner.device)

    def _hidden(self, logits_rows: Any) -> torch.Tensor:
        """The teacher's hidden states at some rows of the logits, or nothing of them where the recipe wants none."""
        return torch.empty(len(logits_rows), 0) if self._hidden_SJ is None else self._hidden_SJ[logits_rows]

    def _lengths(self, batch: RequestRows) -> torch.Tensor:
        """Tokens that each request has so far [B], to the student: the position of the next one."""
        lengths = self._runner.input_batch.num_tokens_no_spec[: len(batch.params)]
        return torch.from_numpy(lengths).to(self._runner.device, torch.int64) - batch.shift_B


def _judge(proposals: Proposals, request_N: torch.Tensor, batch: RequestRows) -> Verdict:
    """Each proposal's fate by the gate of its request; a reference's token is not put to any gate."""
    gates = [params.settings.gate for params in batch.params]
    is_forced_N = batch.is_forced_B[request_N]
    token_N = proposals.draft_N.clone()
    source_N = torch.full_like(token_N, Source.REFERENCE)
    for name in sorted(set(gates)):
        own_B = torch.tensor([gate == name for gate in gates], device=request_N.device)
        rows = (own_B[request_N] & ~is_forced_N).nonzero().squeeze(1)
        if len(rows):
            group = proposals if len(rows) == len(request_N) else proposals.select(rows)
            token_N[rows], source_N[rows] = judge(GATES[name], group)
    flagged_N = ~proposals.settings.write_back & (source_N == Source.REPLACED)
    return Verdict(
        torch.where(flagged_N, proposals.draft_N, token_N), torch.where(flagged_N, Source.FLAGGED, source_N)
    )
