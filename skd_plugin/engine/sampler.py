"""SKD's rule in place of vLLM's rejection sampler: the teacher is the engine's model, the student its draft model.

Shapes: N drafted tokens of the batch, B requests, L draft length, V vocabulary, M tokens emitted in this step, S
rows of the teacher's logits, J width of the teacher.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from skd_plugin.core import rng, sampling
from skd_plugin.core.gates import GATES, Proposals, Verdict, assemble_block, judge
from skd_plugin.core.trace import NOTHING, Source, Trace
from skd_plugin.engine.references import follow
from skd_plugin.engine.request_table import RequestRows, RequestTable


class SKDSampler:
    """Takes the place of the model runner's `_sample`, the one call through which every token of the engine goes.

    It returns the token ids in the runner's own form, [B, L + 1] with -1 for "no token". A fully kept block is
    returned without a bonus token; to the scheduler it looks as if the last draft had been rejected and replaced by
    itself, so its bookkeeping of computed tokens stays right.
    """

    def __init__(self, runner: Any, table: RequestTable, hidden_SJ: torch.Tensor | None = None) -> None:
        """
        Args:
            hidden_SJ: what the teacher's head made the logits of, row by row; a sampler that has it is one step's.
        """
        self._runner = runner
        self._table = table
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
            # A request has a row of logits for each scheduled draft and one more; its next token is that of the first.
            next_token_rows = [first[row] + row for row in undrafted]
            token_BL[undrafted, 0] = self._undrafted(batch, undrafted, next_token_rows, logits)
        return SamplerOutput(sampled_token_ids=token_BL, logprobs_tensors=None)

    def _verify(
        self, batch: RequestRows, logits: torch.Tensor, metadata: SpecDecodeMetadata, counts: list[int]
    ) -> torch.Tensor:
        """Tokens [B, L + 1] of the requests with drafts; rows without stay empty."""
        real = metadata.draft_token_ids >= 0
        counts_B = torch.tensor(counts, device=logits.device)
        logits_rows_N = metadata.target_logits_indices[real]
        draft_N = metadata.draft_token_ids[real].long()
        request_N = torch.arange(len(counts_B), device=logits.device).repeat_interleave(counts_B)
        place_N = torch.arange(len(draft_N), device=logits.device) - (counts_B.cumsum(0) - counts_B)[request_N]
        proposals = Proposals(
            draft_N=draft_N,
            teacher_logits_NV=logits[logits_rows_N].float(),
            student_logp_NV=self._table.take_proposals(self._runner.input_batch.req_ids, counts),
            position_N=self._lengths()[request_N] + place_N,
            seed_N=batch.seed_B[request_N],
            prompt_len_N=batch.prompt_len_B[request_N],
            settings=batch.settings.repeat(counts_B),
        )
        verdict = _judge(proposals, request_N, batch)

        def to_block(value_N: torch.Tensor) -> torch.Tensor:
            shape = (len(counts_B), self._runner.num_spec_tokens + 1)
            return value_N.new_zeros(shape).index_put_((request_N, place_N), value_N)

        kept_N = verdict.token_N == draft_N
        token_BL = assemble_block(to_block(draft_N), to_block(kept_N), to_block(verdict.token_N), counts_B)
        self._record(batch, token_BL, request_N, place_N, proposals, verdict, logits_rows_N)
        return token_BL.to(torch.int32)

    def _undrafted(
        self, batch: RequestRows, rows: list[int], logits_rows: list[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """Tokens of the requests that bring no draft: the end of the prompt, or, after a preemption, the reference's
        next token or one of the teacher.
        """
        runner, teacher_RV = self._runner, logits[logits_rows]
        settings = batch.settings.select(rows)
        probs = sampling.warp(teacher_RV, settings.teacher_temperature, settings.teacher_top_p)
        position = self._lengths()[rows]
        drawn = sampling.draw(probs, rng.uniform(batch.seed_B[rows], position, rng.TEACHER))
        tokens = follow(batch.forced_BF[rows], position - batch.prompt_len_B[rows], drawn).tolist()
        teacher_logp_RV = teacher_RV.float().log_softmax(-1)
        for index, row in enumerate(rows):
            params = batch.params[row]
            if runner.discard_request_mask.np[row]:
                continue  # the prompt is not yet read to its end; the runner throws this token away
            if not runner.requests[runner.input_batch.req_ids[row]].output_token_ids:
                tokens[index] = params.first_token
                continue
            source = Source.UNDRAFTED if params.forced_ids is None else Source.REFERENCE
            own = slice(index, index + 1)
            part = self._undrafted_part(tokens[index], source, teacher_logp_RV[own], self._hidden(logits_rows[own]))
            self._table.record(params.trace_id, part)
        return torch.tensor(tokens, dtype=torch.int32, device=teacher_RV.device)

    def _record(
        self,
        batch: RequestRows,
        token_BL: torch.Tensor,
        request_N: torch.Tensor,
        place_N: torch.Tensor,
        proposals: Proposals,
        verdict: Verdict,
        logits_rows_N: torch.Tensor,
    ) -> None:
        """Adds the emitted tokens of verified blocks to their traces."""
        token_N = token_BL[request_N, place_N]
        emitted = (token_N != NOTHING).nonzero().squeeze(1)
        teacher_logp_MV = proposals.teacher_logits_NV[emitted].log_softmax(-1)
        student_logp_MV = proposals.student_logp_NV[emitted]
        token_M, source_M, draft_M = token_N[emitted], verdict.source_N[emitted], proposals.draft_N[emitted]
        passed_M = (source_M == Source.ACCEPTED) | (source_M == Source.REFERENCE)
        step = Trace(
            response_ids=token_M.to(torch.int32).cpu(),
            source=source_M.to(torch.uint8).cpu(),
            rejected_ids=torch.where(passed_M, NOTHING, draft_M).to(torch.int32).cpu(),
            draft_rank=proposals.rank_N[emitted].to(torch.int32).cpu(),
            student_logp=student_logp_MV.gather(1, token_M[:, None]).squeeze(1).cpu(),
            kl=(teacher_logp_MV.exp() * (teacher_logp_MV - student_logp_MV)).sum(-1).cpu(),
            student_entropy=-(student_logp_MV.exp() * student_logp_MV).sum(-1).cpu(),
            **self._of_teacher(teacher_logp_MV, token_M),
            teacher_hidden=self._hidden(logits_rows_N[emitted]),
        )
        start = 0
        for params, count in zip(batch.params, (token_BL != NOTHING).sum(1).tolist(), strict=True):
            if count:
                self._table.record(params.trace_id, step.slice(start, start + count))
                start += count

    def _undrafted_part(
        self, token: int, source: Source, teacher_logp_1V: torch.Tensor, hidden_1J: torch.Tensor
    ) -> Trace:
        nothing, unknown = torch.tensor([NOTHING], dtype=torch.int32), torch.tensor([float("nan")])
        return Trace(
            response_ids=torch.tensor([token], dtype=torch.int32),
            source=torch.tensor([source], dtype=torch.uint8),
            rejected_ids=nothing,
            draft_rank=nothing,
            student_logp=unknown,
            kl=unknown,
            student_entropy=unknown,
            **self._of_teacher(teacher_logp_1V, torch.tensor([token], device=teacher_logp_1V.device)),
            teacher_hidden=hidden_1J,
        )

    def _hidden(self, logits_rows: Any) -> torch.Tensor:
        """The teacher's hidden states of some rows of the logits, or nothing of them where the recipe wants none."""
        if self._hidden_SJ is None:
            return torch.empty(len(logits_rows), 0)
        return self._hidden_SJ[logits_rows].cpu()

    def _of_teacher(self, teacher_logp_MV: torch.Tensor, token_M: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a trace says of the teacher's distribution and the emitted token; masses are sums, not 1 - head."""
        top_logp, top_ids = teacher_logp_MV.topk(self._table.teacher_top_k, dim=-1)
        others_MV = teacher_logp_MV.scatter(1, top_ids, float("-inf"))
        others_MV.scatter_(1, token_M[:, None], float("-inf"))
        return {
            "teacher_logp": teacher_logp_MV.gather(1, token_M[:, None]).squeeze(1).cpu(),
            "teacher_entropy": torch.special.entr(teacher_logp_MV.exp()).sum(-1).cpu(),
            "teacher_topk_ids": top_ids.to(torch.int32).cpu(),
            "teacher_topk_logp": top_logp.cpu(),
            "teacher_rest_tempered": (others_MV / self._table.loss_temperature).logsumexp(-1).cpu(),
        }

    def _lengths(self) -> torch.Tensor:
        """Tokens that each request has so far [B]: the position of the next one."""
        batch = self._runner.input_batch
        return torch.from_numpy(batch.num_tokens_no_spec[: batch.num_reqs]).to(self._runner.device, torch.int64)


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
