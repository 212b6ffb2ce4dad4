"""An engine with the student alone, whose teacher is elsewhere and reads what it has written (served/).

The student draws with the random numbers by which it would propose, so that the texts of a seed are those of an engine
with both models. Its traces are those of a student in both places; what the teacher says comes later
(core/reading.py).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from skd_plugin.core import rng
from skd_plugin.core.copies import to_device
from skd_plugin.core.trace import NOTHING, OVERLAP, Source
from skd_plugin.engine.arguments import EngineDescription
from skd_plugin.engine.drafter import loadable_weights
from skd_plugin.engine.kernels import rows_of
from skd_plugin.engine.recorder import Recorder
from skd_plugin.engine.references import follow
from skd_plugin.engine.request_table import RequestRows, RequestTable
from skd_plugin.engine.sampler import SKDSampler
from skd_plugin.engine.worker import RecordingWorker


class StudentSampler(SKDSampler):
    """One token a request and step, or none that is new: see `SKDSampler._undrafted`. B requests, N of them drawn."""

    def _sample(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        batch = self._table.rows(self._runner.input_batch.req_ids)
        place_B = self._lengths(batch) - torch.tensor([params.prompt_len for params in batch.params])
        unread_B = torch.from_numpy(self._runner.discard_request_mask.np[: len(batch.params)].copy())
        is_new_B = (place_B == batch.progress_4B[0]) & ~unread_B
        token_B1 = torch.full((len(batch.params), 1), NOTHING, dtype=torch.int32)
        rows_N = is_new_B.nonzero().squeeze(1)
        if len(rows_N):
            token_B1[rows_N, 0] = self._draw(batch, rows_N, place_B[rows_N], logits[:, : self._table.vocab_size])
            batch.note_emitted(token_B1)
        known = (~is_new_B).nonzero().squeeze(1).tolist()
        if known:
            token_B1[known, 0] = self._undrafted(batch, known)
        return SamplerOutput(sampled_token_ids=to_device(token_B1, logits.device), logprobs_tensors=None)

    def _draw(
        self, batch: RequestRows, rows_N: torch.Tensor, place_N: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """New tokens int32 [N], in ordinary memory. Args: rows_N, place_N: there, too."""
        rows, place = to_device(torch.stack([rows_N, place_N]), logits_BV.device)
        noise_N = rng.uniform(batch.seed_B[rows], batch.prompt_len_B[rows] + place, rng.STUDENT)
        own = self._rows(logits_BV, rows)
        token_N = own.sample(batch.settings.select(rows), "student", noise_N)
        if batch.forced_BF is not None:
            token_N = follow(batch.forced_BF[rows], place, token_N)
        drawn_N = token_N.cpu()
        if self._recorder is not None:
            part = self._recorder.record(self._known(batch, rows_N, drawn_N), token_N, own, own, None)
            counts_B = torch.zeros(len(batch.params), dtype=torch.int64).index_fill_(0, rows_N, 1)
            self._table.record(batch, counts_B.tolist(), part)
        return drawn_N.int()

    def _known(self, batch: RequestRows, rows_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """What a trace says of the tokens besides figures; the rank is the teacher's to say."""
        given = [batch.params[row].forced_ids is not None for row in rows_N.tolist()]
        source_N = torch.where(torch.tensor(given), Source.REFERENCE, Source.ACCEPTED)
        nothing_N = torch.full_like(token_N, NOTHING)
        version_N = torch.full_like(token_N, self._table.student_version)
        return torch.stack([token_N, source_N, nothing_N, nothing_N, version_N], dim=1).int()


class StudentWorker(RecordingWorker):
    _skd_model_is = "draft"

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        if not isinstance(runner, GPUModelRunner) or runner.use_async_scheduling:
            raise RuntimeError(
                "the student's sampler lives in vLLM's V1 model runner with synchronous scheduling; set "
                "VLLM_USE_V2_MODEL_RUNNER=0, and start the engine with the arguments of skd_plugin.engine.arguments"
            )
        options = self.vllm_config.additional_config
        vocab_size = options["skd_vocab_size"]
        top_k = min(OVERLAP, vocab_size)
        self._skd_requests = RequestTable(runner.requests, runner.device, top_k, vocab_size)
        recorder = Recorder(top_k, 0, 1.0)
        self._skd_recorder = recorder if self.rank == 0 else None
        self._skd_rows = rows_of(
            options["skd_kernels"], runner.device, runner.model_config.dtype, vocab_size, recorder.wanted
        )
        runner._sample = StudentSampler(runner, self._skd_requests, self._skd_recorder, rows=self._skd_rows)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with loadable_weights():
            super().load_model(*args, **kwargs)

    def load_student(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """New weights, by their Hugging Face names; a subset is fine.

        Raises:
            TypeError: of another dtype than the engine's student.
        """
        expected = self.model_runner.model_config.dtype
        for name, weight in weights:
            if weight.dtype != expected:
                raise TypeError(f"{name} is {weight.dtype}, but the engine's student is {expected}")
        self.model_runner.model.load_weights(weights)

    def describe_skd(self) -> EngineDescription:
        config, vocab_size = self.model_runner.model_config, self._skd_requests.vocab_size
        return {
            "sampler": type(self.model_runner._sample).__qualname__,
            "drafter": "none",
            "teacher": config.model,
            "student": config.model,
            "draft_len": 0,
            "teacher_top_k": 0,
            "student_top_k": 0,
            "loss_temperature": 1.0,
            "end_ids": [],
            "kernels": self._skd_rows.__qualname__,
            "quantization": config.quantization,
            "dtype": str(config.dtype).removeprefix("torch."),
            "vocab_size": vocab_size,
            "teacher_vocab_size": vocab_size,
            "student_vocab_size": config.get_vocab_size(),
        }
