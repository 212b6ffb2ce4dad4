"""The engine's worker with SKD's sampler and drafter in it. Passed to vLLM by path as `worker_cls`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from skd_plugin.core.clock import REST
from skd_plugin.engine import vocabulary
from skd_plugin.engine.arguments import EngineDescription
from skd_plugin.engine.drafter import SKDDrafter, loadable_weights
from skd_plugin.engine.kernels import rows_of
from skd_plugin.engine.recorder import Record, Recorder
from skd_plugin.engine.request_table import RequestTable
from skd_plugin.engine.sampler import SKDSampler
from skd_plugin.engine.scheduler import seconds_of
from skd_plugin.engine.unread_drafts import UnreadDrafts

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker


class RecordingWorker(VllmWorker):
    """A worker that has its requests in a table of ours, which keeps their traces until they are fetched."""

    _skd_requests: RequestTable
    _skd_recorder: Recorder | None  # of the first rank; the others record nothing

    _skd_model_is = "verify"  # the part of the time that the engine's model takes (core/clock.py)
    _skd_scheduling_s = 0.0  # since `take_seconds`

    def execute_model(self, scheduler_output: Any) -> Any:
        requests = self._skd_requests
        self._skd_scheduling_s += seconds_of(scheduler_output)
        with requests.clock.part(self._skd_model_is), _plain_tensors():
            requests.forget(scheduler_output.finished_req_ids)
            requests.schedule(scheduler_output.scheduled_spec_decode_tokens)
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        # What is kept of the requests is the engine's own work, too; drafting and sampling have parts of their own.
        with self._skd_requests.clock.part("schedule"), _plain_tensors():
            return super().sample_tokens(grammar_output)

    def take_traces(self, trace_ids: Sequence[int]) -> list[Record]:
        """What they are made of, on the first rank; the others have none."""
        with self._skd_requests.clock.part("traces"):
            return [] if self._skd_recorder is None else self._skd_requests.take(trace_ids)

    def take_seconds(self) -> dict[str, float]:
        """That went to each part of the engine's work since the last call; the rest of the time it waited."""
        seconds, scheduling_s = self._skd_requests.clock.lap(), self._skd_scheduling_s
        self._skd_scheduling_s = 0.0
        del seconds[REST]
        return seconds | {"schedule": seconds.get("schedule", 0.0) + scheduling_s}

    def student_is(self, version: int) -> None:
        """After its weights have been loaded: how many updates it has had."""
        self._skd_requests.student_version = version


class SKDWorker(RecordingWorker):
    """Installs SKD before a model is loaded, and refuses to start where the sampler could not be the one that runs."""

    def init_device(self) -> None:
        vocabulary.allow_padding()
        super().init_device()
        runner = self.model_runner
        _check_runner(runner)
        options = self.vllm_config.additional_config
        vocab_size = vocabulary.sizes(self.vllm_config).common
        self._skd_requests = RequestTable(
            runner.requests, runner.device, options["skd_teacher_top_k"], vocab_size, options["skd_end_ids"]
        )
        recorder = Recorder(
            options["skd_teacher_top_k"], options["skd_student_top_k"], options["skd_loss_temperature"]
        )
        # The ranks of an engine sample the same tokens, each for itself, and the first is asked for their traces.
        self._skd_recorder = recorder if self.rank == 0 else None
        self._skd_rows = rows_of(
            options["skd_kernels"], runner.device, runner.model_config.dtype, vocab_size, recorder.wanted
        )
        runner.drafter = SKDDrafter(self.vllm_config, runner.device, runner, self._skd_requests, self._skd_rows)
        runner._sample = SKDSampler(runner, self._skd_requests, self._skd_recorder, rows=self._skd_rows)
        UnreadDrafts(runner, self._skd_requests)
        self._skd_hidden = options["skd_teacher_hidden"]
        self._skd_teacher_moves = options["skd_teacher_moves"]

    def sample_tokens(self, grammar_output: Any) -> Any:
        runner, state = self.model_runner, self.model_runner.execute_model_state
        if self._skd_hidden and state is not None:
            # The runner drops its record of the teacher's forward before it samples, so the sampler brings it along.
            runner._sample = SKDSampler(
                runner, self._skd_requests, self._skd_recorder, state.sample_hidden_states, self._skd_rows
            )
        return super().sample_tokens(grammar_output)

    def load_student(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.model_runner.drafter.load_student(weights)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with loadable_weights() if self._skd_teacher_moves else nullcontext():
            super().load_model(*args, **kwargs)

    def load_teacher(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """New weights, by their Hugging Face names; a subset is fine.

        Raises:
            RuntimeError: this run's teacher does not move (skd.teacher.follow).
        """
        if not self._skd_teacher_moves:
            raise RuntimeError("new weights came for a teacher that does not move; nothing was loaded")
        self.model_runner.model.load_weights(weights)

    def describe_skd(self) -> EngineDescription:
        """What is really in place, for the start-up check."""
        runner, sizes = self.model_runner, vocabulary.sizes(self.vllm_config)
        options = self.vllm_config.additional_config
        return {
            "sampler": type(runner._sample).__qualname__,
            "drafter": type(runner.drafter).__qualname__,
            "teacher": runner.model_config.model,
            "student": runner.speculative_config.draft_model_config.model,
            "draft_len": runner.num_spec_tokens,
            "teacher_top_k": options["skd_teacher_top_k"],
            "student_top_k": options["skd_student_top_k"],
            "loss_temperature": options["skd_loss_temperature"],
            "end_ids": [] if self._skd_requests.ends_E is None else self._skd_requests.ends_E.tolist(),
            "kernels": self._skd_rows.__qualname__,
            "quantization": runner.model_config.quantization,
            "dtype": str(runner.model_config.dtype).removeprefix("torch."),
            "vocab_size": sizes.common,
            "teacher_vocab_size": sizes.teacher,
            "student_vocab_size": sizes.student,
        }


def _plain_tensors() -> AbstractContextManager[Any]:
    """On a CPU: while it is open, vLLM's parameters are tensors like any other. They are of a subclass that only their
    loading needs, and each operator would ask it in Python what to do, which is 6 % of a small model's step.
    """
    return nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunctionSubclass()


def _check_runner(runner: object) -> None:
    """Raises RuntimeError if vLLM chose a model runner, a drafter or a schedule that SKD cannot work in."""
    remedy = "Start the engine with the arguments of skd_plugin.engine.arguments."
    if not isinstance(runner, GPUModelRunner):
        raise RuntimeError(
            f"SKD's sampler lives in vLLM's V1 model runner, but vLLM started {type(runner).__module__}."
            f"{type(runner).__qualname__}. Set VLLM_USE_V2_MODEL_RUNNER=0. {remedy}"
        )
    drafter = getattr(runner, "drafter", None)
    if type(drafter) is not DraftModelProposer:
        raise RuntimeError(
            f"SKD needs the student as vLLM's draft model (speculative method 'draft_model'), but the drafter is "
            f"{type(drafter).__qualname__}. {remedy}"
        )
    if runner.use_async_scheduling:
        raise RuntimeError(f"SKD needs synchronous scheduling, but async_scheduling is on. {remedy}")
