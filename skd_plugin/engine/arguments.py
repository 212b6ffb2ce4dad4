"""From a recipe to an engine's arguments: for training, `skd rollout`, `skd eval` and `skd check` alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NotRequired, TypedDict

from skd_plugin.config.context import context_needed, engine_len
from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.vllm_options import OF_TEACHER
from skd_plugin.models import common_vocab_size, joined_ends

WORKER_CLS = "skd_plugin.engine.worker.SKDWorker"
STUDENT_WORKER_CLS = "skd_plugin.engine.student_alone.StudentWorker"
SCHEDULER_CLS = "skd_plugin.engine.scheduler.SKDScheduler"
CPU_CACHE_BYTES = 1 << 30  # key-value cache of an engine on a CPU
WHOLE_PROMPTS = 8192  # tokens of prompts that a student alone reads at once


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made of. It goes to another process as JSON of `dataclasses.asdict`."""

    teacher: str
    student: str
    draft_len: int  # tokens that the student proposes before the teacher looks (gamma), at most
    max_len: int  # tokens of the longest sequence, prompt and response, to the teacher
    teacher_top_k: int  # most probable teacher tokens returned for each response token
    student_top_k: (
        int  # the student's most probable tokens, of which the teacher's log-probabilities are returned, too
    )
    loss_temperature: float  # tau of the loss; the mass of all other tokens is recorded at it
    teacher_hidden: bool  # whether the teacher's last hidden state of each response token is returned, too
    cpu: bool
    openrlhf: dict[str, Any]  # EngineArgs that OpenRLHF makes of its own options
    options: dict[str, Any]  # EngineArgs of the user's (skd.vllm), which win over all others
    teacher_moves: bool = False  # whether it may get new weights
    draft_len_auto: bool = False  # the engine chooses how many, up to `draft_len`
    kernels: str = "auto"  # what reads the models' logits (engine/kernels.py)
    joins_ends: bool = False  # whether the tokens that end a turn are one, where the two models have others
    # Tokens of the longest sequence of an engine with the student alone, whose teacher is elsewhere; None: it has both
    alone_len: int | None = None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that are one end event, that which stands for them first; none: nothing is joined."""
        return joined_ends(self.teacher, self.student) if self.joins_ends else ()

    def arguments(self, openrlhf: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keywords of vLLM's EngineArgs for an engine with teacher and student.

        Args:
            openrlhf: those with which OpenRLHF starts this one engine, e.g. with a seed of its own; they win over the
                recipe's (`self.openrlhf`).
        """
        skd = self._student_alone() if self.alone_len is not None else self._pair()
        return {**self._of_openrlhf(openrlhf or {}), **skd, **self._of_device(), **self.options}

    def _pair(self) -> dict[str, Any]:
        return {
            "model": self.teacher,
            "speculative_config": {
                "method": "draft_model",
                "model": self.student,
                "num_speculative_tokens": self.draft_len,
                "draft_sample_method": "probabilistic",
                **self._experts_of_the_student(),
            },
            "worker_cls": WORKER_CLS,
            "scheduler_cls": SCHEDULER_CLS,
            "additional_config": {
                "skd_teacher_top_k": self.teacher_top_k,
                "skd_student_top_k": self.student_top_k,
                "skd_loss_temperature": self.loss_temperature,
                "skd_teacher_hidden": self.teacher_hidden,
                "skd_teacher_moves": self.teacher_moves,
                "skd_draft_len_auto": self.draft_len_auto,
                "skd_end_ids": list(self.end_ids),
                "skd_kernels": self.kernels,
            },
            "async_scheduling": False,
            # One group of caches for all layers: vLLM hands the student's layers what it knows of the first group.
            "disable_hybrid_kv_cache_manager": True,
            "max_model_len": context_needed(self.max_len, self.draft_len),
        }

    def _student_alone(self) -> dict[str, Any]:
        assert self.alone_len is not None
        return {
            "model": self.student,
            "worker_cls": STUDENT_WORKER_CLS,
            "scheduler_cls": SCHEDULER_CLS,
            "additional_config": {
                "skd_vocab_size": common_vocab_size(self.teacher, self.student),
                "skd_kernels": self.kernels,
            },
            "async_scheduling": False,
            "max_model_len": context_needed(self.alone_len, 0),
        }

    @property
    def dtype(self) -> str:
        """Of the weights, by vLLM's name."""
        return self.plain_arguments()["dtype"]

    def plain_arguments(self) -> dict[str, Any]:
        """Keywords of vLLM's EngineArgs for an engine with the student alone."""
        plain = {
            "model": self.student,
            "max_model_len": self.max_len,
            # vLLM takes back the random numbers of a prompt that was read in part, which no CPU generator can.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(WHOLE_PROMPTS, self.max_len),
        }
        options = {name: value for name, value in self.options.items() if name not in OF_TEACHER}
        return {**self._of_openrlhf({}), **plain, **self._of_device(), **options}

    def _of_openrlhf(self, given: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {**self.openrlhf, **given}
        if "trust_remote_code" in self.openrlhf:
            arguments["trust_remote_code"] = self.openrlhf["trust_remote_code"]  # OpenRLHF always says true
        if self.cpu:
            arguments.pop("gpu_memory_utilization", None)  # there a share of all memory, and not of a GPU's
            arguments.pop("enable_sleep_mode", None)  # there is nothing to free, and vLLM refuses it
            if arguments.get("distributed_executor_backend") == "ray":  # OpenRLHF's, for an engine of several ranks
                arguments["distributed_executor_backend"] = "mp"  # vLLM's of Ray knows no CPU
        return arguments

    def _experts_of_the_student(self) -> dict[str, Any]:
        """The only kernels on a GPU that read a student's experts as its checkpoint has them. The others, which vLLM
        prefers on newer ones, swap or shuffle them once they are loaded; new weights would come out of order.
        """
        return {} if self.cpu else {"moe_backend": "triton"}

    def _of_device(self) -> dict[str, Any]:
        if not self.cpu:
            return {"dtype": "bfloat16"}
        return {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_CACHE_BYTES,
        }


class EngineDescription(TypedDict):
    """What a running engine says of itself."""

    sampler: str  # name of the class
    drafter: str  # name of the class; "none" where the teacher is elsewhere
    teacher: str  # the engine's model, which is the student where the teacher is elsewhere
    student: str
    draft_len: int
    teacher_top_k: int
    student_top_k: int
    loss_temperature: float
    end_ids: list[int]  # tokens that are one end event; empty: nothing is joined
    kernels: str  # name of the class that reads the models' logits
    quantization: str | None  # vLLM's name of how the teacher's weights are rounded; None: they are full
    dtype: str  # of the weights, as torch names it
    vocab_size: int  # ids that both models have
    teacher_vocab_size: int
    student_vocab_size: int
    teacher_place: NotRequired[int]  # which of the recipe's it is; of an engine of a run


def engine_for(skd: SKDConfig, options: Mapping[str, Any], *, student: str, cpu: bool) -> EngineSpec:
    """The engine that trains by a recipe. Who needs less of it takes `dataclasses.replace`.

    Args:
        skd: with one teacher (`SKDConfig.of_teacher`).
        options: all of OpenRLHF's, by their dotted names.
    """
    return EngineSpec(
        teacher=skd.the_teacher.model_name_or_path,
        student=student,
        draft_len=skd.draft_len,
        draft_len_auto=skd.rollout.draft_len == "auto",
        max_len=engine_len(options, skd.longest_teacher_prompt),
        teacher_top_k=skd.loss.teacher_top_k,
        student_top_k=skd.loss.student_top_k,
        loss_temperature=skd.loss.temperature,
        teacher_hidden=skd.loss.vocabulary == "full",
        kernels=skd.rollout.kernels,
        joins_ends=skd.joins_ends,
        cpu=cpu,
        openrlhf={
            "tensor_parallel_size": options["vllm.tensor_parallel_size"],
            "enforce_eager": options["vllm.enforce_eager"],
            "enable_prefix_caching": options["vllm.enable_prefix_caching"],
            "gpu_memory_utilization": options["vllm.gpu_memory_utilization"],
            "seed": options["train.seed"],
            "trust_remote_code": skd.trust_remote_code,
        },
        options=dict(skd.vllm),
        alone_len=options["data.max_len"] if skd.is_served else None,
    )
