"""How often a step of the sampler would wait for a GPU, counted on one that is none, with the tokens of a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from skd_plugin.core import copies, logit_rows
from skd_plugin.core.gates import GATES
from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.engine.drafter import Drafting, SKDDrafter
from skd_plugin.engine.recorder import Recorder
from skd_plugin.engine.request import RequestParams
from skd_plugin.engine.request_table import RequestTable
from skd_plugin.engine.sampler import SKDSampler
from skd_plugin.engine.unread_drafts import UNREAD, Sampled, UnreadDrafts
from tests.pretended_gpu import GPU, PretendedGpu, held, to_gpu

REQUESTS, DRAFT_LEN, VOCAB, TOP_K, PROMPT = 6, 3, 50, 4, 5
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read in several parts, and an event is there at once."""
    monkeypatch.setattr(logit_rows, "ENTRIES_ON_CPU", 7 * VOCAB)
    monkeypatch.setattr(logit_rows, "ENTRIES_ON_GPU", 7 * VOCAB)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch._C.TensorBase.pin_memory)  # vLLM's CPU worker has its own
    monkeypatch.setattr(copies, "_event_now", lambda device: SimpleNamespace(synchronize=lambda: None))


def logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class Engine:
    """As much of vLLM as sampler and drafter see, on a device, for requests that have been drafted for."""

    def __init__(
        self, settings: list[SamplingSettings], device: torch.device, *, forced: tuple[int, ...] = ()
    ) -> None:
        self.ids = [str(place) for place in range(len(settings))]
        states = {
            name: SimpleNamespace(
                sampling_params=SimpleNamespace(
                    extra_args=RequestParams(
                        trace_id=place,
                        prompt_len=PROMPT,
                        first_token=3,
                        seed=100 + place,
                        settings=own,
                        forced_ids=list(range(20)) if place in forced else None,
                    ).to_extra_args()
                )
            )
            for place, (name, own) in enumerate(zip(self.ids, settings, strict=True))
        }
        self._put = to_gpu if device == GPU else lambda tensor: tensor
        self.table = RequestTable(states, device, TOP_K, VOCAB)
        self.runner = SimpleNamespace(
            num_spec_tokens=DRAFT_LEN,
            discard_request_mask=SimpleNamespace(np=np.zeros(len(settings), bool)),
            input_batch=SimpleNamespace(
                req_ids=self.ids, num_reqs=len(settings), num_tokens_no_spec=np.full(len(settings), PROMPT)
            ),
        )
        self.sampler = SKDSampler(self.runner, self.table, Recorder(TOP_K, 0, 1.0))

    def draft(self) -> torch.Tensor:
        """Tokens [B, L] of the student."""
        size = len(self.ids)
        heads = iter([self._put(logits(size, seed=place)) for place in range(DRAFT_LEN)])
        drafter = SimpleNamespace(
            model=SimpleNamespace(compute_logits=lambda hidden: next(heads)),
            _table=self.table,
            _rows=self.sampler._rows,
        )
        drafting = Drafting(self.table.rows(self.ids), self._put(torch.full((size,), PROMPT)), DRAFT_LEN)
        tokens = [SKDDrafter._sample_draft_tokens(drafter, None, drafting)[0] for _ in range(DRAFT_LEN)]
        token_BL = torch.stack(tokens, dim=1)
        self.table.keep_proposals(self.ids, drafting.logits_LBV, token_BL)
        return token_BL

    def verify(self, token_BL: torch.Tensor, drafted: list[bool]) -> torch.Tensor:
        """Tokens [B, L + 1]; where nothing was drafted vLLM schedules placeholders."""
        scheduled = {
            name: row if real else [-1] * DRAFT_LEN
            for name, row, real in zip(self.ids, token_BL.tolist(), drafted, strict=True)
        }
        self.table.schedule(scheduled)
        self.runner.input_batch.num_tokens_no_spec -= ~np.array(drafted)  # these end their prompts
        rows = torch.arange(len(self.ids) * (DRAFT_LEN + 1)).view(-1, DRAFT_LEN + 1)[:, :-1].flatten()
        metadata: Any = SimpleNamespace(
            num_draft_tokens=[DRAFT_LEN] * len(self.ids),
            draft_token_ids=self._put(torch.tensor(list(scheduled.values()), dtype=torch.int32).flatten()),
            target_logits_indices=self._put(rows.int()),
        )
        teacher = self._put(logits(len(self.ids) * (DRAFT_LEN + 1), seed=9))
        return self.sampler(teacher, metadata).sampled_token_ids


@torch.no_grad()
def test_waits_are_seen() -> None:
    """Else none would be counted below."""
    with PretendedGpu() as gpu:
        values = to_gpu(torch.arange(4.0))
        for wait in (
            lambda: bool((values > 1).any()),
            lambda: values.cpu(),
            lambda: values[values > 1],
            lambda: values.masked_select(values > 1),
            lambda: values.nonzero(),
            lambda: values.repeat_interleave(values.long()),
            lambda: torch.arange(3).to(values.device),
            lambda: torch.arange(3).to(values.device, non_blocking=True),
            lambda: torch.arange(3).pin_memory().to(values.device),
            lambda: values.unique(),
            lambda: values.copy_(torch.arange(4.0)),
        ):
            before = gpu.waits.total()
            wait()
            assert gpu.waits.total() > before, wait
        for no_wait in (
            lambda: values.to("cpu", non_blocking=True),
            lambda: torch.arange(3).pin_memory().to(values.device, non_blocking=True),
            lambda: values.repeat_interleave(2),
            lambda: values.repeat_interleave(values.long(), output_size=6),
            lambda: values[torch.arange(1, device=values.device)],
            lambda: torch.where(values > 1, values, 0.0).softmax(-1),
        ):
            before = gpu.waits.copy()
            no_wait()
            assert gpu.waits == before, no_wait
        values[torch.arange(1, device=values.device)] = 0
        assert gpu.waits == before, "assignment"


WARPED = {"student_temperature": 0.7, "student_top_p": 0.9, "teacher_temperature": 1.4, "teacher_top_p": 0.8}
BATCHES = {
    **{gate: [SamplingSettings(5, gate, 0.4)] * REQUESTS for gate in GATES},
    "nuclei and temperatures": [SamplingSettings(5, **WARPED)] * REQUESTS,
    "greedy": [SamplingSettings(5, student_temperature=0.0, teacher_temperature=0.0)] * REQUESTS,
    "decay, no write-back": [SamplingSettings(5, top_k_decay_len=4, write_back=False)] * REQUESTS,
    "all gates at once": [SamplingSettings(5, gate, 0.4, **WARPED) for gate in GATES],
}


# Where a response may be in a leg of the teacher, its text is waited for.
THREE = {"legs of the teacher": [SamplingSettings(1, hand_over_len=3)] * REQUESTS}


@pytest.mark.parametrize("name", [*BATCHES, *THREE])
@torch.no_grad()
def test_two_waits_a_step_and_none_a_drafted_token(name: str) -> None:
    """With references, and with requests that bring no draft, among the others."""
    settings = (BATCHES | THREE)[name]
    there = Engine(settings, GPU, forced=(1,))
    drafted = [place != 2 for place in range(len(settings))]
    with PretendedGpu() as gpu:
        there.table.rows(there.ids)
        token_BL = there.draft()
        assert not gpu.waits, gpu.waits
        proposals = held(token_BL)
        emitted_BL = there.verify(proposals, drafted)
        assert sum(gpu.waits.values()) <= 2 + (name in THREE), gpu.waits
        traces = [record.trace() for record in there.table.take([*range(len(settings))])]
    here = Engine(settings, CPU, forced=(1,))
    assert torch.equal(here.draft(), proposals)
    assert torch.equal(here.verify(proposals, drafted), held(emitted_BL))
    for found, expected in zip(traces, here.table.take([*range(len(settings))]), strict=True):
        for name, tensor in vars(expected.trace()).items():
            torch.testing.assert_close(getattr(found, name), tensor, equal_nan=True)
    assert len(traces[2]) == 0 and traces[1].source.tolist() == [3] * DRAFT_LEN


@torch.no_grad()
def test_nobody_waits_for_drafts_before_they_are_verified() -> None:
    """Of six requests the third joins with a placeholder, the fourth has room for two drafts, and the last one waited
    for a step.
    """
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    there = Engine([SamplingSettings(5)] * REQUESTS, GPU)
    runner, books, read = there.runner, [[7], [8, 9], [3], [4], [5], [6]], [4, 4, 5, 3, 4, 4]
    runner.device = GPU
    runner._bookkeeping_sync = lambda plan, sampled, *rest: RejectionSampler.parse_output(
        sampled.sampled_token_ids, 50
    )[0]
    runner._prepare_input_ids = lambda *plan: runner.input_ids.gpu.fill_(0)
    runner.input_ids = SimpleNamespace(gpu=to_gpu(torch.full((sum(read),), -5, dtype=torch.int32)))
    UnreadDrafts(runner, there.table)
    emitted_BL = torch.full((REQUESTS, DRAFT_LEN + 1), -1, dtype=torch.int32)
    for row, tokens in enumerate(books):
        emitted_BL[row, : len(tokens)] = torch.tensor(tokens)
    with PretendedGpu() as gpu:
        earlier_BL, token_BL = there.draft(), there.draft()
        waited = there.ids[-1:]
        there.table.keep_proposals(waited, to_gpu(torch.zeros(DRAFT_LEN, 1, VOCAB)), earlier_BL[-1:])
        runner._draft_token_ids, runner._draft_token_req_ids = token_BL, there.ids
        assert runner._bookkeeping_sync(None, Sampled(emitted_BL, GPU), None, None, 0) == books
        numbers, ids = runner._get_draft_token_ids_cpu()
        assert numbers == [[UNREAD] * DRAFT_LEN] * REQUESTS and ids == there.ids
        numbers[2], numbers[3] = [-1] * 4, numbers[3][:2]
        there.table.schedule(dict(zip(ids, numbers, strict=True)))
        runner._prepare_input_ids(None, REQUESTS, sum(read), np.cumsum(read, dtype=np.int32))
        assert not gpu.waits, gpu.waits
    drafts, expected = held(token_BL).tolist(), []
    for row, (number, own) in enumerate(zip(read, drafts, strict=True)):
        kept = {2: [], 3: own[:2], 5: held(earlier_BL)[5].tolist()}.get(row, own)
        expected += [0] * (number - len(kept)) + kept
    assert held(runner.input_ids.gpu).tolist() == expected
