"""A cost model of the memory of a run, per device. Estimates; docs/check.md has the formulas and what they leave out.

Bytes everywhere. N tokens of a micro-batch, V vocabulary, H hidden size, L layers,
P parameters of the student, d data-parallel ranks of the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skd_plugin.adapters import LoraOptions, with_adapters
from skd_plugin.core.chunked import FEW_LOGITS
from skd_plugin.core.logit_rows import ENTRIES_ON_GPU
from skd_plugin.models import changed_logits, count_parameters, without_weights
from skd_plugin.quantization import bits_of

GIB = 1 << 30

# Of each of the N x V logits in the training step, at its peak; measured (tests/unit/test_check_memory.py).
LOGIT_BYTES = 24
# Of each logit that SKD's sampler reads at once, of at most ENTRIES_ON_GPU; measured, 16 with the paper's gate, 40
# with nuclei of both models and the gate that looks at most (scripts/bench_sampler.py).
SAMPLER_BYTES = 40
RUNTIME = 1 * GIB  # CUDA context, NCCL and allocator, a process
GATHERED_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
BUCKET_PARAMETERS = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size


@dataclass(frozen=True)
class ModelSize:
    parameters: int  # tied ones counted once
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    embeddings: int = 0  # parameters of embedding and output head, which no rounding takes in
    rounded_bits: float | None = None  # of each of the others, where they are rounded
    adapters: int = 0  # parameters of LoRA adapters beside them, and then the only ones that are trained
    latent: int = 0  # numbers of a compressed cache, a token and layer (multi-head latent attention); 0: there is none
    plain_head: bool = True  # logits are no more than its product with a hidden state

    @property
    def trained(self) -> int:
        return self.adapters or self.parameters

    def weights(self, bytes_per_number: int) -> int:
        if self.rounded_bits is None:
            return self.parameters * bytes_per_number
        rounded = self.parameters - self.embeddings
        return self.embeddings * bytes_per_number + int(rounded * self.rounded_bits / 8)

    def kv_per_token(self, bytes_per_number: int, tensor_parallel: int = 1) -> int:
        """Cache of one token on one device; a key-value head is not split, and a latent cache is on every device."""
        numbers = self.latent or 2 * -(-self.kv_heads // tensor_parallel) * self.head_dim
        return self.layers * numbers * bytes_per_number


def model_size(config: Any, lora: LoraOptions | None = None) -> ModelSize:
    """From a transformers configuration; the parameters are counted on the meta device, where they take no memory."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    latent = getattr(text, "kv_lora_rank", None)
    return ModelSize(
        parameters=count_parameters(config),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        embeddings=text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2),
        rounded_bits=bits_of(config),
        adapters=count_adapters(config, lora) if lora else 0,
        latent=latent + text.qk_rope_head_dim if latent else 0,
        plain_head=changed_logits(config) is None,
    )


def count_adapters(config: Any, lora: LoraOptions) -> int:
    model = with_adapters(without_weights(config), lora)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class EngineMemory:
    """Memory of one device of an engine. `budget` is what vLLM may take; it does not know of SKD's sampler."""

    budget: int
    teacher: int
    student: int
    activations: int
    kv_per_token: int
    kv_per_sequence: int
    concurrent: int  # requests that would be in the engine at once if all had room
    sampler_logits: int  # of the student at the drafts of a sequence, which wait for the teacher
    bytes_per_number: int

    @property
    def cache(self) -> int:
        """What is left for the key-value cache; negative: the weights alone do not fit."""
        return self.budget - self.teacher - self.student - self.activations

    @property
    def sequences(self) -> int:
        """Longest sequences that fit at once."""
        return max(0, self.cache // self.kv_per_sequence)

    @property
    def sampler(self) -> int:
        logits = self.sampler_logits * min(self.concurrent, self.sequences or self.concurrent)
        return self.bytes_per_number * logits + SAMPLER_BYTES * min(logits, ENTRIES_ON_GPU)

    @property
    def peak(self) -> int:
        """The sampler runs when the forward's activations are free again, and takes more where they do not do."""
        return self.budget + max(0, self.sampler - (self.activations - RUNTIME))


def engine_memory(
    teacher: ModelSize,
    student: ModelSize,
    *,
    budget: int,
    bytes_per_number: int,
    tensor_parallel: int,
    max_len: int,
    draft_len: int,
    concurrent: int,
    batched_tokens: int,
) -> EngineMemory:
    """
    Args:
        concurrent: requests that a step brings to the engine, or fewer if vLLM is told to take fewer at once.
        batched_tokens: tokens of one forward (vLLM's max_num_batched_tokens).
    """
    wide = max(teacher, student, key=lambda model: model.hidden)
    per_token = 2 * wide.intermediate // tensor_parallel + 4 * wide.hidden
    kv = sum(model.kv_per_token(bytes_per_number, tensor_parallel) for model in (teacher, student))
    return EngineMemory(
        budget=budget,
        teacher=teacher.weights(bytes_per_number) // tensor_parallel,
        student=student.weights(bytes_per_number) // tensor_parallel,
        activations=batched_tokens * per_token * bytes_per_number + RUNTIME,
        kv_per_token=kv,
        kv_per_sequence=kv * max_len,
        concurrent=concurrent,
        sampler_logits=draft_len * teacher.vocabulary,
        bytes_per_number=bytes_per_number,
    )


@dataclass(frozen=True)
class TrainerMemory:
    """Memory of one device of the trainer; `host` is ordinary memory beside it."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    logits: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        return self.between_steps + self.logits + self.activations

    @property
    def between_steps(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def asleep(self) -> int:
        """OpenRLHF moves gradients and optimizer to ordinary memory, and keeps the weights, which are to be sent."""
        return self.weights + self.buffers


def trainer_memory(
    student: ModelSize,
    *,
    mixed_precision: bool,
    zero_stage: int,
    ranks: int,
    adam_offload: bool,
    overlap_comm: bool,
    tokens: int,
    checkpointing: bool,
    chunk: int | None = None,
    teacher_hidden: int = 0,
) -> TrainerMemory:
    """DeepSpeed's ZeRO (arXiv 1910.02054, section 3) with AdamW.

    In bfloat16: 2 P weights, 2 P gradients, 12 P optimizer (float32 weights and two moments); in float32: 4 P, 4 P and
    8 P. Stage 1 splits the optimizer over d, stage 2 also the gradients, stage 3 also the weights. Of a student with
    LoRA adapters P are theirs, and the weights of both.

    Args:
        tokens: of one forward.
        chunk: tokens whose logits are in memory at once, beside the gradient of the output head in float32; None:
            those of all tokens.
        teacher_hidden: hidden sizes of all teachers together, of a loss over the full vocabulary, which needs their
            output heads; else 0.
    """
    p, width = student.trained, 2 if mixed_precision else 4
    optimizer = p * (12 if mixed_precision else 8) // (ranks if zero_stage >= 1 else 1)
    step_gradients = 4 * p // (ranks if zero_stage >= 1 else 1) if mixed_precision else 0  # float32, while it steps
    if chunk:
        chunk = max(chunk, FEW_LOGITS // student.vocabulary)
    heads = student.vocabulary * (4 * student.hidden + width * teacher_hidden) if chunk else 0
    return TrainerMemory(
        weights=width * (student.parameters + student.adapters) // (ranks if zero_stage == 3 else 1),
        gradients=width * p // (ranks if zero_stage >= 2 else 1),
        optimizer=0 if adam_offload else optimizer + step_gradients,
        buffers=_buffers(student, width, zero_stage, overlap_comm) + (RUNTIME if mixed_precision else 0),
        logits=min(tokens, chunk or tokens) * student.vocabulary * LOGIT_BYTES + heads,
        activations=tokens * _activation_bytes(student, width, checkpointing),
        host=optimizer + step_gradients if adam_offload else 0,
    )


def _buffers(student: ModelSize, width: int, zero_stage: int, overlap_comm: bool) -> int:
    """Gradients on their way to other ranks (two buckets, where communication overlaps) and gathered weights."""
    if zero_stage == 0:
        return 0
    buckets = (2 if overlap_comm else 1) * min(student.trained, BUCKET_PARAMETERS)
    whole = min(student.parameters + student.adapters, GATHERED_PARAMETERS)
    gathered = whole if zero_stage == 3 else min(student.trained, BUCKET_PARAMETERS)
    return width * (buckets + gathered)


def _activation_bytes(model: ModelSize, width: int, checkpointing: bool) -> int:
    """Bytes of one token that a layer keeps for its backward, after Korthikanti et al. (arXiv 2205.05198, section
    4.1), for gated MLPs and an attention that does not store its scores. With checkpointing each layer keeps its
    input, and one layer at a time is computed again."""
    attention = 2 * model.heads * model.head_dim + 2 * model.kv_heads * model.head_dim
    layer = width * (6 * model.hidden + attention + 4 * model.intermediate)
    return model.layers * width * model.hidden + layer if checkpointing else model.layers * layer


def in_gib(number: float) -> str:
    """'1.2 GiB', or in MiB below a tenth of one."""
    return f"{number / GIB:.1f} GiB" if abs(number) >= GIB / 10 else f"{number / (1 << 20):.1f} MiB"
