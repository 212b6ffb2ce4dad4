"""A cost model of the time of a step. Estimates, never compared with a GPU; docs/gpus.md shows what comes of them.

Seconds, bytes and FLOPs everywhere. P parameters, R requests of one engine at once, n tokens of one forward, gamma the
drafts of a block, alpha the probability that a proposal is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skd_plugin.check.memory_model import GIB, EngineMemory, ModelSize


@dataclass(frozen=True)
class Gpu:
    """By its vendor's data sheet: dense bfloat16, memory bandwidth, and NVLink in one direction."""

    name: str
    flops: float  # a second
    bandwidth: float  # bytes a second
    memory: int  # bytes, as CUDA reports them, rounded down
    link: float  # bytes a second to another GPU of the node


GPUS = (
    Gpu("A100-80GB", 312e12, 2039e9, 79 * GIB, 300e9),
    Gpu("H100-80GB", 989e12, 3350e9, 79 * GIB, 450e9),
    Gpu("H200", 989e12, 4800e9, 139 * GIB, 450e9),
)

# What is assumed, for want of a measurement. The first three are shares of the data sheet's numbers.
BANDWIDTH_SHARE = 0.7  # of a forward that reads its weights once
PREFILL_SHARE = 0.5  # of the FLOPs, in forwards of many tokens
TRAINING_SHARE = 0.3  # of the FLOPs, in forward and backward of a small model in small micro-batches
PINNED = 20e9  # bytes a second between a GPU and its node's pinned memory, one direction: PCIe 4, less its overhead
NETWORK = 20e9  # bytes a second between nodes: 200 Gbit/s, less its overhead
FORWARD_S = 1e-3  # of any forward in the engine, however small: kernels to start, in CUDA graphs
# Of a block beside its forwards: scheduler, sampler and traces in Python. Some of it passes while the student drafts,
# which is not taken off.
BLOCK_S = 8e-3
MICRO_BATCH_S = 0.1  # of a micro-batch beside its FLOPs: kernels to start, DeepSpeed's hooks
UPDATE_S = 0.1  # of the optimizer beside its bytes
STEP_S = 1.0  # of Ray, OpenRLHF's loop, prompts and metrics, a step

# What a step's traces cost, measured by scripts/bench_traces.py on one core of an AMD EPYC (docs/gpus.md).
TRACE_BYTES = 562  # of a response token with 64 teacher entries, in the object store
CONTROLLER_S = 0.54e-3, 0.5e-3  # of a response, and of a message of them: the controller's CPU time, OpenRLHF's in it
MESSAGES = 512  # of a step's responses at most: AT_ONCE of host/asked.py
CONTROLLER_BYTES = 3700, 47  # of a response, and of each of its tokens: what it reads and writes


def tokens_per_block(acceptance: float, draft_len: int) -> float:
    """Expected tokens that a block of SKD adds: 1 + alpha + ... + alpha^(gamma - 1) = (1 - alpha^gamma) / (1 - alpha).

    The first rejected proposal is replaced and ends the block. Plain speculative decoding has one term more, the bonus
    token of a block that is kept whole; SKD has none.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"the rate of acceptance is {acceptance}, but must be in [0, 1]")
    return float(sum(acceptance**place for place in range(draft_len)))


def forward_seconds(model: ModelSize, gpu: Gpu, *, tokens: float, cached: float, tensor_parallel: int = 1) -> float:
    """Time of one forward in the engine: reading weights and cache, or the FLOPs, whichever takes longer.

    max((2 P + cache) / bandwidth, 2 P n / FLOPs) / t + FORWARD_S, in bfloat16.

    Args:
        tokens: n, that go through the model.
        cached: tokens whose keys and values are read.
    """
    read = model.weights(2) + cached * model.kv_per_token(2)
    reading = read / (gpu.bandwidth * BANDWIDTH_SHARE)
    computing = 2 * model.parameters * tokens / (gpu.flops * PREFILL_SHARE)
    return max(reading, computing) / tensor_parallel + FORWARD_S


def block_seconds(
    teacher: ModelSize, student: ModelSize, gpu: Gpu, *, requests: int, context: float, draft_len: int, split: int = 1
) -> float:
    """Time of one block for `requests` at once: gamma forwards of the student over R tokens, one of the teacher over
    R (gamma + 1), each with R contexts in its cache, and BLOCK_S. `split`: tensor-parallel GPUs of the engine."""
    cached = requests * context
    draft = forward_seconds(student, gpu, tokens=requests, cached=cached, tensor_parallel=split)
    checked = requests * (draft_len + 1)
    return (
        draft_len * draft
        + forward_seconds(teacher, gpu, tokens=checked, cached=cached, tensor_parallel=split)
        + BLOCK_S
    )


def rollout_seconds(
    teacher: ModelSize,
    student: ModelSize,
    gpu: Gpu,
    *,
    requests: int,
    at_once: int,
    prompt_len: int,
    response_len: int,
    draft_len: int,
    acceptance: float,
    split: int = 1,
) -> float:
    """Time of the responses of one engine, all of one length: prompts through both models, then blocks until the end.

    Where only `at_once` of the requests have room, they come in waves, of which each takes as long.
    """
    waves = math.ceil(requests / at_once)
    width = math.ceil(requests / waves)
    blocks = math.ceil(response_len / tokens_per_block(acceptance, draft_len))
    context = prompt_len + response_len / 2
    block = block_seconds(teacher, student, gpu, requests=width, context=context, draft_len=draft_len, split=split)
    prefill = sum(
        forward_seconds(model, gpu, tokens=width * prompt_len, cached=0, tensor_parallel=split)
        for model in (teacher, student)
    )
    return waves * (prefill + blocks * block)


def training_seconds(
    student: ModelSize,
    gpu: Gpu,
    *,
    sequences: int,
    sequence_len: int,
    updates: int,
    ranks: int,
    across_nodes: bool,
    micro_batch: int,
    checkpointing: bool,
    rollout_logp: bool,
) -> float:
    """Forward and backward, 6 P FLOPs a token (8 P with checkpointing, 2 P more for the forward that rewards need);
    for each update of the weights ZeRO's traffic and the optimizer.

    Traffic of a rank: gradients out and weights in, 2 P bytes each, over the slowest link. Optimizer: 16 P / d bytes
    read and written.
    """
    passes = 6 + 2 * checkpointing + 2 * rollout_logp
    flops = passes * student.parameters * sequences * sequence_len
    computing = flops / (ranks * gpu.flops * TRAINING_SHARE)
    micro_batches = math.ceil(sequences / (ranks * micro_batch))
    link = NETWORK if across_nodes else gpu.link
    traffic = 2 * student.weights(2) / link if ranks > 1 else 0.0
    optimizer = 2 * student.weights(16) / ranks / (gpu.bandwidth * BANDWIDTH_SHARE)
    return computing + micro_batches * MICRO_BATCH_S + updates * (traffic + optimizer + UPDATE_S)


def sync_seconds(student: ModelSize, gpu: Gpu, *, across_nodes: bool) -> float:
    """The student's weights from rank 0 to all engines in one broadcast: 2 P bytes over the slowest link."""
    return student.weights(2) / (NETWORK if across_nodes else gpu.link)


def controller_seconds(responses: int) -> float:
    """CPU time of the one process that all responses of a step go through: it makes OpenRLHF's samples and batches of
    them.
    """
    of_response, of_message = CONTROLLER_S
    return responses * of_response + min(responses, MESSAGES) * of_message


def controller_bytes(responses: int, tokens: int) -> int:
    of_response, of_token = CONTROLLER_BYTES
    return responses * of_response + tokens * of_token


def sleep_seconds(engine: float, trainer: float) -> float:
    """What sleeps in a step goes to ordinary memory and comes back once: 2 bytes / PINNED.

    Args:
        engine: bytes of its weights, 0 where it does not sleep.
        trainer: bytes of its gradients and optimizer, likewise.
    """
    return 2 * (engine + trainer) / PINNED


@dataclass(frozen=True)
class StepTime:
    rollout: float
    train: float
    sync: float
    sleep: float = 0.0

    @property
    def total(self) -> float:
        """The parts follow each other: the student that proposes is the one that was just trained."""
        return self.rollout + self.train + self.sync + self.sleep + STEP_S


def sequences_at_once(engine: EngineMemory) -> int:
    """Requests that are in the engine together."""
    return max(1, min(engine.concurrent, engine.sequences))
