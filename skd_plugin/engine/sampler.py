"""SKD's rule in place of vLLM's rejection sampler: the teacher is the engine's model, the student its draft model.

Shapes: N drafted tokens of the batch, B requests, R of them without a draft, L draft length, V vocabulary, M tokens
emitted, S rows of the teacher's or of the student's logits, J width of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from skd_plugin.core.copies import to_device
from skd_plugin.core.hand_over import hand_over
from skd_plugin.core.logit_rows import LogitRows
from skd_plugin.core.proposals import Proposals
from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.core.verify import Verdict, assemble_block, judge_groups
from skd_plugin.engine.recorder import Part, Recorder
from skd_plugin.engine.request_table import RequestRows, RequestTable, Scheduled
from skd_plugin.engine.unread_drafts import Sampled


class SKDSampler:
    """Takes the place of the model runner's `_sample`, the one call (in its `sample_tokens`) through which every token
    of the engine goes.

    It returns the token ids in the runner's own form, [B, L + 1] with -1 for "no token", as `_bookkeeping_sync` and
    the rejection sampler's `parse_output` read them. A fully kept block is returned without a bonus token; to the
    scheduler's `update_from_output` it looks as if the last draft had been rejected and replaced by itself, so its
    bookkeeping of computed tokens stays right.
    """

    def __init__(
        self,
        runner: Any,
        table: RequestTable,
        recorder: Recorder | None,
        hidden_SJ: torch.Tensor | None = None,
        rows: type[LogitRows] = LogitRows,
    ) -> None:
        """
        Args:
            recorder: None: no trace is kept.
            rows: how logits are read.
            hidden_SJ: what the teacher's head made the logits of, row by row; a sampler that has it is one step's.
        """
        self._runner, self._table, self._recorder = runner, table, recorder
        self._hidden_SJ, self._rows = hidden_SJ, rows

    def __call__(self, logits: torch.Tensor, metadata: SpecDecodeMetadata | None) -> Sampled:
        with self._table.clock.part("sample"):
            return self._sample(logits, metadata)

    def _sample(self, logits: torch.Tensor, metadata: SpecDecodeMetadata | None) -> Sampled:
        request_ids = self._runner.input_batch.req_ids
        batch, now = self._table.rows(request_ids), self._table.scheduled(request_ids)
        width = 1 if metadata is None else self._runner.num_spec_tokens + 1
        token_BL = torch.full((len(now.counts), width), NOTHING, dtype=torch.int32)
        if any(now.counts):
            assert metadata is not None
            token_BL[:] = self._verify(batch, now, logits[:, : self._table.vocab_size], metadata)
        undrafted = [row for row, count in enumerate(now.counts) if not count]
        if undrafted:
            token_BL[undrafted, 0] = self._undrafted(batch, undrafted)
        return Sampled(token_BL, logits.device)

    def _verify(
        self, batch: RequestRows, now: Scheduled, logits: torch.Tensor, metadata: SpecDecodeMetadata
    ) -> torch.Tensor:
        """Tokens [B, L + 1] of the requests with drafts, in ordinary memory; rows without stay empty.

        What can be known without the device is worked out here. The device is waited for twice: for what the gates
        keep (`judge_groups`), and for the verdict; once more where a response may be in a leg of the teacher. What is
        recorded arrives later.
        """
        request_N, place_N = now.request_N, now.place_N
        scheduled_B = torch.tensor(metadata.num_draft_tokens)
        # Of all scheduled drafts, one a row and request by request: _calc_spec_decode_metadata.
        entry_N = (scheduled_B.cumsum(0) - scheduled_B)[request_N] + place_N
        student_SV, student_row_N = self._table.take_proposals(now)
        sent = torch.stack([request_N, entry_N, self._lengths(batch)[request_N] + place_N, student_row_N])
        on_device, entry, position, student_row = to_device(sent, logits.device)
        proposals = Proposals(
            draft_N=metadata.draft_token_ids[entry].long(),
            teacher=self._rows(logits, metadata.target_logits_indices[entry], self._table.ends_E),
            student=self._rows(student_SV, student_row),
            position_N=position,
            seed_N=batch.seed_B[on_device],
            prompt_len_N=batch.prompt_len_B[on_device],
            settings=batch.settings.select(on_device),
        )
        verdict = _flag(judge_groups(batch.groups(request_N), proposals), proposals)
        *here, draft_N = torch.stack([*verdict, proposals.draft_N]).cpu()
        verdict = Verdict(*here)
        if batch.hands_over:
            settings = batch.settings_here.select(request_N)
            verdict, after_N = hand_over(proposals, settings, draft_N, verdict, batch.legs, request_N, place_N)

        def to_block(value_N: torch.Tensor) -> torch.Tensor:
            shape = (len(now.counts), self._runner.num_spec_tokens + 1)
            return value_N.new_zeros(shape).index_put_((request_N, place_N), value_N)

        kept_N = verdict.token_N == draft_N
        token_BL = assemble_block(to_block(draft_N), to_block(kept_N), to_block(verdict.token_N), now.counts_B)
        emitted_M = (token_BL[request_N, place_N] != NOTHING).nonzero().squeeze(1)
        batch.note_emitted(token_BL)
        if batch.hands_over:
            last = emitted_M[request_N[emitted_M].diff(append=torch.tensor([-1])) != 0]  # of each block
            batch.progress_4B[2:, request_N[last]] = torch.stack([*after_N])[:, last]
        if self._recorder is not None:
            self._table.clock.begin("record")
            passed_N = (verdict.source_N == Source.ACCEPTED) | (verdict.source_N == Source.REFERENCE)
            rejected_N = torch.where(passed_N, NOTHING, draft_N)
            # Before an update vLLM preempts what is in flight: no draft of an older version is left to be verified.
            version_N = torch.full_like(draft_N, self._table.student_version)
            known_CN = torch.stack([verdict.token_N, verdict.source_N, rejected_N, verdict.rank_N, version_N])
            part = self._record(known_CN[:, emitted_M], emitted_M, proposals)
            self._table.record(batch, (token_BL != NOTHING).sum(1).tolist(), part)
            self._table.clock.end()
        return token_BL

    def _record(self, known_CM: torch.Tensor, emitted_M: torch.Tensor, proposals: Proposals) -> Part:
        """What the trace says of emitted tokens. Both tensors are in ordinary memory."""
        assert self._recorder is not None
        rows, token_M = to_device(torch.stack([emitted_M, known_CM[0]]), proposals.draft_N.device)
        teacher = proposals.teacher.select(rows)
        hidden_MJ = None if self._hidden_SJ is None else self._hidden_SJ[teacher.rows_N]
        return self._recorder.record(known_CM.T.int(), token_M, teacher, proposals.student.select(rows), hidden_MJ)

    def _undrafted(self, batch: RequestRows, rows: list[int]) -> torch.Tensor:
        """Tokens [R] of the requests that bring no draft. They are known: the end of the prompt, or the last token of
        a response that goes on after a preemption (engine/scheduler.py).
        """
        position_B, known = self._lengths(batch).tolist(), []
        for row in rows:
            params = batch.params[row]
            if self._runner.discard_request_mask.np[row]:
                known.append(params.first_token)  # not yet read to its end: the runner throws this token away
            elif position_B[row] < params.prompt_len:
                known.append(params.first_token)
            else:
                known.append(self._table.last_token(batch, row, position_B[row] - params.prompt_len))
        return torch.tensor(known, dtype=torch.int32)

    def _lengths(self, batch: RequestRows) -> torch.Tensor:
        """Tokens that each request has so far, to the student, int64 [B] in ordinary memory: the place of the next."""
        lengths = self._runner.input_batch.num_tokens_no_spec[: len(batch.params)]
        return torch.from_numpy(lengths).long() - torch.tensor([params.shift for params in batch.params])


def _flag(verdict: Verdict, proposals: Proposals) -> Verdict:
    """The rejected proposals of requests without write-back stay, and are only marked."""
    if proposals.settings.values("write_back") == {True}:
        return verdict
    flagged_N = ~proposals.settings.write_back & (verdict.source_N == Source.REPLACED)
    return verdict._replace(
        token_N=torch.where(flagged_N, proposals.draft_N, verdict.token_N),
        source_N=verdict.source_N.masked_fill(flagged_N, Source.FLAGGED),
    )
