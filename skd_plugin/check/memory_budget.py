"""The cost model of memory.py applied to a recipe: what it needs of each device, and whether the device has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from skd_plugin.adapters import LoraOptions
from skd_plugin.check.environment import gpus_needed
from skd_plugin.check.findings import Finding
from skd_plugin.check.memory_model import (
    RUNTIME,
    SAMPLER_BYTES,
    EngineMemory,
    ModelSize,
    TrainerMemory,
    engine_memory,
    in_gib,
    model_size,
    trainer_memory,
)
from skd_plugin.config.context import engine_len
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.logit_rows import ENTRIES_ON_GPU
from skd_plugin.engine.arguments import CPU_CACHE_BYTES
from skd_plugin.quantization import WHILE_LOADING, bits_of, method_of
from skd_plugin.words import first_line

BATCHED_TOKENS = 8192  # vLLM's max_num_batched_tokens for most GPUs
CPU_BATCHED_TOKENS = 2048
UNKNOWN = (AttributeError, ValueError, ImportError)  # of an architecture with other names, or code of its own
NARROW = {"bfloat16", "float16", "half", "auto"}


@dataclass(frozen=True)
class Budget:
    engine: EngineMemory
    trainer: TrainerMemory
    requests: int  # that a step brings to one engine


def make_budget(
    teacher: ModelSize,
    student: ModelSize,
    skd: SKDConfig,
    options: HostOptions,
    *,
    cpu: bool,
    device: int | None,
    others: Sequence[ModelSize] = (),
) -> Budget:
    """
    Args:
        device: bytes of one device; None where it is not known, and then the engine has no budget.
        others: the run's other teachers, which are in other engines; the trainer has the output heads of all.
    """
    if skd.is_served:
        teacher = replace(teacher, parameters=0, embeddings=0, layers=0, hidden=0, intermediate=0, rounded_bits=None)
    trainers = gpus_needed(options)[0]
    responses = options["rollout.batch_size"] * options["rollout.n_samples_per_prompt"]
    requests = -(-responses // options["vllm.num_engines"])
    asked = skd.vllm.get("quantization")
    if asked in WHILE_LOADING:
        teacher = replace(teacher, rounded_bits=WHILE_LOADING[asked])
    bytes_per_number = 2 if skd.vllm.get("dtype", "float32" if cpu else "bfloat16") in NARROW else 4
    engine = engine_memory(
        teacher,
        student,
        budget=int((device or 0) * _utilization(skd, options)),
        bytes_per_number=bytes_per_number,
        tensor_parallel=options["vllm.tensor_parallel_size"],
        max_len=engine_len(options, skd.longest_teacher_prompt),
        draft_len=skd.draft_len,
        concurrent=min(requests, skd.vllm.get("max_num_seqs", requests)),
        batched_tokens=skd.vllm.get("max_num_batched_tokens", CPU_BATCHED_TOKENS if cpu else BATCHED_TOKENS),
    )
    split = options["ds.tensor_parallel_size"]
    spread = student.embeddings + (student.parameters - student.embeddings) // split
    trainer = trainer_memory(
        replace(student, parameters=spread),
        mixed_precision=not cpu,
        zero_stage=options["ds.zero_stage"],
        ranks=trainers // split,
        adam_offload=options["ds.adam_offload"],
        overlap_comm=options["ds.overlap_comm"],
        tokens=_tokens_of_a_batch(options),
        checkpointing=options["actor.gradient_checkpointing_enable"],
        chunk=skd.loss.chunk if student.plain_head and not options["ds.deepcompile"] and split == 1 else None,
        teacher_hidden=sum(one.hidden for one in (teacher, *others)) if skd.loss.vocabulary == "full" else 0,
    )
    return Budget(engine, trainer, requests)


def _tokens_of_a_batch(options: HostOptions) -> int:
    """The most that one forward of the training step may get on a device; a ring's ranks share it."""
    longest, ring = options["data.max_len"], options["ds.ring_attn_size"]
    if options["train.dynamic_batch_enable"]:
        return max(options["train.max_tokens_per_gpu"], -(-longest // ring))  # a longer sequence is its own batch
    return -(-options["train.micro_batch_size"] * longest // ring)


def fits_twice(config: Any, skd: SKDConfig, options: HostOptions, device: int | None) -> bool:
    """Whether one engine holds a model as teacher and as student, with a cache for one sequence."""
    try:
        size = model_size(config)
    except UNKNOWN:
        return True  # not known: let the engine say so
    return make_budget(size, size, skd, options, cpu=False, device=device).engine.sequences >= 1


def _utilization(skd: SKDConfig, options: HostOptions) -> float:
    name = "gpu_memory_utilization"
    return skd.vllm[name] if name in skd.vllm else options[f"vllm.{name}"]


def check_memory(
    teacher: Any,
    student: Any,
    skd: SKDConfig,
    options: HostOptions,
    *,
    cpu: bool,
    device: int | None,
    others: Sequence[Any] = (),
) -> list[Finding]:
    """`teacher`, `student`, `others` (the run's other teachers): transformers configurations."""
    try:
        sizes = model_size(teacher), model_size(student, LoraOptions.of(options))
        more = [model_size(one) for one in others]
    except UNKNOWN as error:
        return [Finding("memory", f"not estimated: {first_line(error)}", "warning", "watch the first steps")]
    budget = make_budget(*sizes, skd, options, cpu=cpu, device=device, others=more)
    rounding = teacher_rounding(teacher, skd)
    counted = "" if bits_of(teacher) or rounding in WHILE_LOADING else ", but counted in full"
    rounded = f" (rounded: {rounding}{counted})" if rounding else ""
    if skd.is_served:
        rounded = " (elsewhere, and not counted below)"
    parameters = Finding(
        "parameters", f"teacher {_count(sizes[0].parameters)}{rounded}, student {_students(sizes[1])}"
    )
    if cpu:
        return [parameters, _cpu(budget, skd, options, device or 0)]
    findings = [parameters, _engine(budget, skd, options, device), _trainer(budget, options, device)]
    return [*findings, *_ordinary_memory(budget, options)]


def teacher_rounding(config: Any, skd: SKDConfig) -> str | None:
    """The name of the rounding of the teacher's weights, by vLLM while it loads them or in its files; None: full."""
    return skd.vllm.get("quantization") or method_of(config)


def _engine(budget: Budget, skd: SKDConfig, options: HostOptions, device: int | None) -> Finding:
    engine = budget.engine
    weights = (
        f"weights {in_gib(engine.teacher + engine.student)} (teacher {in_gib(engine.teacher)}, student "
        f"{in_gib(engine.student)}), cache {in_gib(engine.kv_per_sequence)} a sequence of {options['data.max_len']}"
    )
    name = "engine (estimate)"
    if device is None:
        return Finding(name, weights)
    share = _utilization(skd, options)
    found = (
        f"{weights}; {in_gib(engine.budget)} ({share:.0%} of the GPU) leave room for {engine.sequences:,} sequences "
        f"at once, and a step brings {budget.requests:,}; the sampler takes {in_gib(engine.sampler)}"
    )
    if engine.sequences == 0:
        return Finding(
            name,
            found,
            "failed",
            "raise openrlhf.vllm.tensor_parallel_size or vllm.gpu_memory_utilization, or lower data.max_len",
        )
    if engine.peak > device:
        room = device - engine.budget + engine.activations - RUNTIME - SAMPLER_BYTES * ENTRIES_ON_GPU
        limit = max(1, room // (engine.sampler_logits * engine.bytes_per_number))
        return Finding(
            name,
            found,
            "warning",
            f"vLLM's share leaves too little for the sampler: lower openrlhf.vllm.gpu_memory_utilization, or set "
            f"skd.vllm={{max_num_seqs: {limit}}}",
        )
    if engine.sequences < budget.requests:
        return Finding(name, found, "warning", "some wait for others to end; more engines would be faster")
    return Finding(name, found)


def _trainer(budget: Budget, options: HostOptions, device: int | None) -> Finding:
    colocated = options["train.colocate_all"]
    trainer = budget.trainer
    need = _colocated(budget, options) if colocated else trainer.total
    found = f"{_parts(trainer)}: {in_gib(trainer.total)} at ZeRO stage {options['ds.zero_stage']}"
    if gpus_needed(options)[2] or options["algo.kl.init_coef"] > 0:
        found += " (a reference, critic or reward model is not counted)"
    if colocated:
        found += f", with the engine on the same GPU {in_gib(need)}"
    name = "trainer (estimate)"
    if device is None:
        return Finding(name, found)
    found += f" of {in_gib(device)}"
    if need <= device:
        return Finding(name, found)
    return Finding(name, found, "failed" if need > 1.15 * device else "warning", "; ".join(_savings(options)))


def _colocated(budget: Budget, options: HostOptions) -> int:
    """Bytes of a GPU that trainer and engine take turns on: the larger of what training and sampling need there."""
    trainer, engine = budget.trainer, budget.engine
    training = trainer.total + (RUNTIME if options["vllm.enable_sleep"] else engine.peak)
    sampling = engine.peak + (trainer.asleep if options["ds.enable_sleep"] else trainer.between_steps)
    return max(training, sampling)


def _savings(options: HostOptions) -> list[str]:
    """What would help, cheapest first."""
    colocated, dynamic = options["train.colocate_all"], options["train.dynamic_batch_enable"]
    longest = options["data.max_len"]
    ways = [
        (colocated and not options["vllm.enable_sleep"], "openrlhf.vllm.enable_sleep=true"),
        (colocated and not options["ds.enable_sleep"], "openrlhf.ds.enable_sleep=true"),
        (colocated, "lower openrlhf.vllm.gpu_memory_utilization"),
        (dynamic and options["train.max_tokens_per_gpu"] > longest, "lower openrlhf.train.max_tokens_per_gpu"),
        (not dynamic and options["train.micro_batch_size"] > 1, "lower openrlhf.train.micro_batch_size"),
        (not options["actor.gradient_checkpointing_enable"], "openrlhf.actor.gradient_checkpointing_enable=true"),
        (options["ds.zero_stage"] < 3, "openrlhf.ds.zero_stage=3"),
        (not options["ds.adam_offload"], "openrlhf.ds.adam_offload=true"),
    ]
    return [way for possible, way in ways if possible] or ["more GPUs for the trainer, or a shorter data.max_len"]


def _ordinary_memory(budget: Budget, options: HostOptions) -> list[Finding]:
    """What waits in each node's ordinary memory, pinned, while another process has the GPU."""
    trainer, engine = budget.trainer, budget.engine
    parts = {"the optimizer": trainer.host}
    if options["train.colocate_all"]:
        if options["vllm.enable_sleep"]:
            parts["sleeping engines"] = engine.teacher + engine.student
        if options["ds.enable_sleep"]:
            parts["sleeping trainers"] = trainer.gradients + trainer.optimizer
    parts = {name: size * options["actor.num_gpus_per_node"] for name, size in parts.items() if size}
    if not parts:
        return []
    words = ", ".join(f"{name} {in_gib(size)}" for name, size in parts.items())
    return [Finding("ordinary memory (estimate)", f"of each node: {words}")]


def _cpu(budget: Budget, skd: SKDConfig, options: HostOptions, device: int) -> Finding:
    """All of a run shares one memory."""
    trainers = gpus_needed(options)[0]
    cache = skd.vllm.get("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    engine = budget.engine.teacher + budget.engine.student + budget.engine.activations + budget.engine.sampler + cache
    need = options["vllm.num_engines"] * engine + trainers * budget.trainer.total
    found = (
        f"engine {in_gib(engine)} (weights {in_gib(budget.engine.teacher + budget.engine.student)}, cache "
        f"{in_gib(cache)}); trainer {in_gib(budget.trainer.total)} ({_parts(budget.trainer)}); together "
        f"{in_gib(need)} of {in_gib(device)}"
    )
    if cache < budget.engine.kv_per_sequence:
        return Finding(
            "memory (estimate)",
            found,
            "failed",
            f"a sequence of {options['data.max_len']} tokens needs {in_gib(budget.engine.kv_per_sequence)} of cache: "
            "raise kv_cache_memory_bytes in skd.vllm",
        )
    if need > device:
        return Finding("memory (estimate)", found, "failed", "; ".join(_savings(options)))
    return Finding("memory (estimate)", found)


def _parts(trainer: TrainerMemory) -> str:
    parts = {
        "weights": trainer.weights,
        "gradients": trainer.gradients,
        "optimizer": trainer.optimizer,
        "buffers": trainer.buffers,
        "logits": trainer.logits,
        "activations": trainer.activations,
    }
    return ", ".join(f"{name} {in_gib(size)}" for name, size in parts.items() if size)


def _students(size: ModelSize) -> str:
    of_adapters = f" and {_count(size.adapters)} of LoRA adapters, which alone are trained" if size.adapters else ""
    return _count(size.parameters) + of_adapters


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
