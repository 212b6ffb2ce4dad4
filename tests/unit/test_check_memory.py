"""The memory estimates against numbers worked out by hand, and against real parameter counts and allocations."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, Gemma2Config, Qwen2Config

from skd_plugin.adapters import LoraOptions
from skd_plugin.check.memory_budget import check_memory, fits_twice, make_budget
from skd_plugin.check.memory_model import (
    GATHERED_PARAMETERS,
    GIB,
    LOGIT_BYTES,
    RUNTIME,
    SAMPLER_BYTES,
    engine_memory,
    in_gib,
    model_size,
    trainer_memory,
)
from skd_plugin.config.host_options import host_parser
from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.logit_rows import ENTRIES_ON_GPU
from skd_plugin.core.losses import forward_kl, top_k_loss
from skd_plugin.core.targets import Targets
from skd_plugin.models import count_parameters
from skd_plugin.quantization import bits_of, method_of
from tests.peak_bytes import PeakBytes

GPU = 80 * GIB


def qwen(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool):
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
    )


SMALL = qwen(896, 24, 14, 2, 4864, 151936, tied=True)  # the shape of Qwen2.5-0.5B
BIG = qwen(3584, 28, 28, 4, 18944, 152064, tied=False)  # the shape of Qwen2.5-7B
SMALL_PARAMETERS = 494_032_768  # both as their model cards give them, to the last parameter
BIG_PARAMETERS = 7_615_616_512


@pytest.fixture(scope="module")
def sizes():
    return model_size(BIG), model_size(SMALL)


def options(**changes):
    parsed = vars(host_parser().parse_args([]))
    ours = {
        "vllm.num_engines": 1,
        "actor.num_gpus_per_node": 4,
        "algo.kl.init_coef": 0,
        "algo.advantage.estimator": "reinforce",
        "rollout.n_samples_per_prompt": 1,
        "vllm.gpu_memory_utilization": 0.9,
    }
    return parsed | ours | changes


def skd(**sections):
    return SKDConfig(teacher={"model_name_or_path": "t"}, **sections)


# --- sizes of models ---


def test_parameters_of_two_known_models(sizes):
    big, small = sizes
    assert (big.parameters, small.parameters) == (BIG_PARAMETERS, SMALL_PARAMETERS)
    assert (small.layers, small.kv_heads, small.head_dim, small.vocabulary) == (24, 2, 64, 151936)


def test_parameters_of_the_tiny_models(tiny_pair, hf_models):
    for name, model in hf_models.items():
        assert count_parameters(AutoConfig.from_pretrained(tiny_pair / name)) == model.num_parameters()


def test_cache_of_a_token(sizes):
    big, small = sizes
    assert small.kv_per_token(2) == 24 * 2 * 2 * 64 * 2 == 12_288
    assert big.kv_per_token(2) == 28 * 2 * 4 * 128 * 2 == 57_344
    assert big.kv_per_token(2, tensor_parallel=4) == 14_336
    assert small.kv_per_token(2, tensor_parallel=4) == 24 * 2 * 1 * 64 * 2, "a key-value head is not split"
    assert replace(big, latent=576).kv_per_token(2, tensor_parallel=4) == 28 * 576 * 2


# --- the engine ---


def test_engine_by_hand(sizes):
    engine = engine_memory(
        *sizes,
        budget=72 * GIB,
        bytes_per_number=2,
        tensor_parallel=2,
        max_len=1024,
        draft_len=5,
        concurrent=64,
        batched_tokens=8192,
    )
    assert engine.teacher == BIG_PARAMETERS
    assert engine.student == SMALL_PARAMETERS
    assert engine.kv_per_token == 57_344 // 2 + 12_288 // 2 == 34_816
    assert engine.kv_per_sequence == 34_816 * 1024
    activations = 8192 * (2 * 18944 // 2 + 4 * 3584) * 2 + RUNTIME
    assert engine.activations == activations
    assert engine.cache == 72 * GIB - BIG_PARAMETERS - SMALL_PARAMETERS - activations
    assert engine.sequences == engine.cache // (34_816 * 1024)
    drafts = 64 * 5 * 152064
    assert engine.sampler == 2 * drafts + SAMPLER_BYTES * ENTRIES_ON_GPU, "rows are read some at a time"
    assert engine.peak == 72 * GIB + engine.sampler - (activations - RUNTIME)
    few = replace(engine, kv_per_sequence=engine.cache // 3)
    assert few.sequences == 3 and few.sampler == 3 * 5 * 152064 * (2 + SAMPLER_BYTES)
    assert few.peak == 72 * GIB, "the room of the forward's activations is enough"


# --- the trainer ---


def trainer(size, **changes):
    settings = dict(
        mixed_precision=True,
        zero_stage=2,
        ranks=8,
        adam_offload=False,
        overlap_comm=False,
        tokens=2 * 1024,
        checkpointing=False,
    )
    return trainer_memory(size, **(settings | changes))


def test_of_adapters_only_theirs_are_trained():
    """Rank 32 on all linear layers: 32 (in + out) of each, by hand; 2 bytes a weight, 2 a gradient, 16 of AdamW."""
    size = model_size(BIG, LoraOptions(32, 32, 0.0, "all-linear"))
    layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert size.adapters == 28 * 32 * layer and size.parameters == BIG_PARAMETERS
    found = trainer(size, zero_stage=2, ranks=4)
    assert found.weights == 2 * (BIG_PARAMETERS + size.adapters)
    assert found.gradients == 2 * size.adapters // 4
    assert found.optimizer == 16 * size.adapters // 4
    assert found.buffers == 2 * 2 * size.adapters + RUNTIME
    gathered = trainer(size, zero_stage=3, ranks=4)
    assert gathered.weights == 2 * (BIG_PARAMETERS + size.adapters) // 4
    assert gathered.buffers == 2 * (size.adapters + GATHERED_PARAMETERS) + RUNTIME


def test_a_recipe_with_adapters_needs_less():
    whole, adapters = (
        check_memory(BIG, SMALL, skd(), options(**{"ds.lora.rank": rank}), cpu=False, device=GPU) for rank in (0, 16)
    )
    assert "and 8.8 M of LoRA adapters, which alone are trained" in adapters[0].found
    assert "LoRA" not in whole[0].found
    gradients = [re.search(r"gradients (\S+) (\S+),", findings[2].found).groups() for findings in (whole, adapters)]
    assert gradients[0] != gradients[1]


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 2, 16), (1, 2, 2, 16 / 8), (2, 2, 2 / 8, 16 / 8), (3, 2 / 8, 2 / 8, 16 / 8)],
)
def test_zero_stages(sizes, stage, weights, gradients, optimizer):
    """Bytes a parameter: 2 + 2 + 12, and 4 for float32 gradients while the optimizer steps."""
    found = trainer(sizes[0], zero_stage=stage)
    assert found.weights == pytest.approx(weights * BIG_PARAMETERS, abs=8)
    assert found.gradients == pytest.approx(gradients * BIG_PARAMETERS, abs=8)
    assert found.optimizer == pytest.approx(optimizer * BIG_PARAMETERS, abs=8)
    assert found.host == 0


def test_offloading_moves_the_optimizer(sizes):
    here, away = trainer(sizes[0]), trainer(sizes[0], adam_offload=True)
    assert away.optimizer == 0 and away.host == here.optimizer


def test_float32_has_no_master_weights(sizes):
    found = trainer(sizes[1], mixed_precision=False, zero_stage=0)
    assert found.weights + found.gradients + found.optimizer == 16 * SMALL_PARAMETERS
    assert found.buffers == 0


def test_logits_and_activations(sizes):
    found = trainer(sizes[1])
    assert found.logits == 2 * 1024 * 151936 * LOGIT_BYTES
    layer = 2 * (6 * 896 + 2 * 14 * 64 + 2 * 2 * 64 + 4 * 4864)
    assert found.activations == 2 * 1024 * 24 * layer
    assert trainer(sizes[1], checkpointing=True).activations == 2 * 1024 * (24 * 2 * 896 + layer)


def test_full_vocabulary_has_logits_of_one_chunk_and_both_heads(sizes):
    """Float32 gradient of the student's head, and the teacher's head. Measured without the latter, 0.96 GB in float32
    (docs/full_vocabulary.md); by this 1.01."""
    found = trainer(sizes[1], chunk=128, teacher_hidden=3584)
    assert found.logits == 128 * 151936 * LOGIT_BYTES + 151936 * (4 * 896 + 2 * 3584)
    few = trainer(sizes[1], tokens=64, chunk=128, teacher_hidden=0)
    assert few.logits == 64 * 151936 * LOGIT_BYTES + 151936 * 4 * 896
    given = options(**{"rollout.batch_size": 64, "train.micro_batch_size": 2, "data.max_len": 1024})
    full = make_budget(*sizes, skd(loss={"vocabulary": "full"}), given, cpu=False, device=GPU)
    assert full.trainer.logits == found.logits
    two = make_budget(*sizes, skd(loss={"vocabulary": "full"}), given, cpu=False, device=GPU, others=[sizes[1]])
    assert two.trainer.logits == found.logits + 151936 * 2 * 896, "a head of each teacher"
    assert two.engine == full.engine
    plain = make_budget(*sizes, skd(), given, cpu=False, device=GPU, others=[sizes[1]])
    assert plain.trainer.logits == few.logits + 64 * 151936 * LOGIT_BYTES


def test_top_k_has_logits_of_one_chunk_where_the_head_is_plain(sizes):
    given = {"rollout.batch_size": 64, "train.micro_batch_size": 2, "data.max_len": 1024}

    def logits(student=sizes[1], loss=None, **changes):
        asked = skd(loss=loss or {}), options(**given | changes)
        return make_budget(sizes[0], student, *asked, cpu=False, device=GPU).trainer.logits

    everything = 2 * 1024 * 151936 * LOGIT_BYTES
    assert logits() == 128 * 151936 * LOGIT_BYTES + 151936 * 4 * 896
    assert logits(loss={"chunk": 64}) == 64 * 151936 * LOGIT_BYTES + 151936 * 4 * 896
    capped = Gemma2Config(vocab_size=151936, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    assert model_size(SMALL).plain_head and not model_size(capped).plain_head
    assert logits(replace(sizes[1], plain_head=False)) == logits(loss={"chunk": None}) == everything
    assert logits(**{"ds.deepcompile": True}) == everything


def test_buckets_and_gathered_weights(sizes):
    assert trainer(sizes[0]).buffers == 2 * (500_000_000 + 500_000_000) + RUNTIME
    assert trainer(sizes[0], overlap_comm=True).buffers == 2 * (1_000_000_000 + 500_000_000) + RUNTIME
    assert trainer(sizes[0], zero_stage=3).buffers == 2 * (500_000_000 + 1_000_000_000) + RUNTIME
    assert trainer(sizes[1]).buffers == 2 * 2 * SMALL_PARAMETERS + RUNTIME


def test_bytes_of_a_logit_are_those_of_the_training_step():
    """Follows every allocation of a step's part behind the student's body; measured, 24.0 bytes a logit."""
    hidden_BTH = torch.randn(2, 128, 8, requires_grad=True)
    head_HV, top_k = torch.randn(8, 4096).bfloat16(), 64
    ids_NK = torch.stack([torch.randperm(4096)[:top_k] for _ in range(2 * 127)])
    teacher_NC = torch.randn(2 * 127, top_k + 1).log_softmax(-1)
    targets = Targets(
        teacher_ids_NK=ids_NK,
        teacher_logp_NK=teacher_NC[:, :-1],
        teacher_rest_N=teacher_NC[:, -1],
        token_N=ids_NK[:, 0],
        token_teacher_logp_N=teacher_NC[:, 0],
        token_student_logp_N=teacher_NC[:, 0],
        teacher_entropy_N=teacher_NC[:, 0],
        source_N=torch.zeros(2 * 127, dtype=torch.uint8),
    )
    batch_N, time_N = torch.ones(2, 127).nonzero(as_tuple=True)
    with PeakBytes() as peak:
        logits = (hidden_BTH.bfloat16() @ head_HV).to(torch.float32)  # the host's Actor makes float32 of them
        top_k_loss(forward_kl)(logits[batch_N, time_N], targets).mean().backward()
    assert peak.bytes / (2 * 128 * 4096) == pytest.approx(LOGIT_BYTES, rel=0.15)


# --- a recipe's options ---


def test_budget_reads_the_hosts_options(sizes):
    given = options(
        **{
            "ds.zero_stage": 3,
            "ds.adam_offload": True,
            "actor.num_nodes": 2,
            "vllm.num_engines": 3,
            "vllm.tensor_parallel_size": 4,
            "rollout.batch_size": 50,
            "rollout.n_samples_per_prompt": 2,
            "data.max_len": 512,
            "train.micro_batch_size": 4,
            "actor.gradient_checkpointing_enable": True,
        }
    )
    found = make_budget(*sizes, skd(rollout={"draft_len": 3}), given, cpu=False, device=GPU)
    assert found.requests == 34  # of 100 responses on 3 engines
    assert found.engine.budget == int(0.9 * GPU)
    assert found.engine.teacher == BIG_PARAMETERS * 2 // 4
    assert found.engine.sampler == 34 * 3 * 152064 * (2 + SAMPLER_BYTES)
    changes = dict(zero_stage=3, adam_offload=True, tokens=4 * 512, checkpointing=True, ranks=8, chunk=128)
    expected = trainer(sizes[1], **changes)
    assert found.trainer == expected


def test_our_engine_options_win(sizes):
    ours = skd(vllm={"gpu_memory_utilization": 0.5, "dtype": "float32", "max_num_seqs": 7})
    found = make_budget(*sizes, ours, options(), cpu=False, device=GPU)
    assert found.requests == 1024 and found.engine.concurrent == 7
    assert found.engine.budget == GPU // 2
    assert found.engine.teacher == 4 * BIG_PARAMETERS
    assert found.engine.sampler == 7 * 5 * 152064 * (4 + SAMPLER_BYTES)


W4 = {"num_bits": 4, "group_size": 128}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"a": {"weights": W4}, "b": {"weights": {"num_bits": 8}}},
}


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.125),
        ({"quant_method": "awq", "w_bit": 4, "group_size": -1}, 4),
        (COMPRESSED, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "of tomorrow"}, None),
    ],
)
def test_bits_of_a_rounded_weight(settings, bits):
    config = SimpleNamespace(quantization_config=settings)
    assert (bits_of(config), method_of(config)) == (bits, settings["quant_method"])
    assert (bits_of(BIG), method_of(BIG)) == (None, None)


EMBEDDINGS = 2 * 152064 * 3584  # of BIG, with the head, which stay full


def test_a_teacher_that_vllm_rounds(sizes):
    found = make_budget(*sizes, skd(vllm={"quantization": "fp8"}), options(), cpu=False, device=GPU).engine
    assert found.teacher == 2 * EMBEDDINGS + (BIG_PARAMETERS - EMBEDDINGS)
    assert found.student == 2 * SMALL_PARAMETERS
    assert check(skd(vllm={"quantization": "fp8"}))[0].found == "teacher 7.62 B (rounded: fp8), student 494.0 M"
    assert "(rounded: quark, but counted in full)" in check(skd(vllm={"quantization": "quark"}))[0].found


def test_a_teacher_that_is_rounded_in_its_files(sizes):
    config = deepcopy(BIG)
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    found = make_budget(model_size(config), sizes[1], skd(), options(), cpu=False, device=GPU).engine
    assert found.teacher == 2 * EMBEDDINGS + int((BIG_PARAMETERS - EMBEDDINGS) * 4.125 / 8)


def levels(findings):
    return {finding.name.split()[0]: finding.level for finding in findings}


def check(config=skd(), device=GPU, **changes):  # noqa: B008
    return check_memory(BIG, SMALL, config, options(**changes), cpu=False, device=device)


ALL_LOGITS = skd(loss={"chunk": None})


def test_a_pair_that_fits():
    findings = check(**{"rollout.batch_size": 64})
    assert levels(findings) == {"parameters": "ok", "engine": "ok", "trainer": "ok"}
    assert findings[0].found == "teacher 7.62 B, student 494.0 M"
    assert "14.2 GiB" in findings[1].found and "90% of the GPU" in findings[1].found


def test_a_teacher_that_does_not_fit():
    engine = check(device=16 * GIB)[1]
    assert engine.level == "failed" and "tensor_parallel_size" in engine.remedy


def test_a_step_that_brings_more_than_fits_at_once():
    engine = check(device=24 * GIB, **{"rollout.batch_size": 50, "data.max_len": 2048})[1]
    assert engine.level == "warning" and "wait" in engine.remedy


def test_sampler_rows_outside_of_vllms_share():
    tight = {"rollout.batch_size": 512, "vllm.gpu_memory_utilization": 0.997}
    engine = check(**tight)[1]
    assert engine.level == "warning" and "max_num_seqs" in engine.remedy
    limit = int(re.search(r"max_num_seqs: (\d+)", engine.remedy)[1])
    assert limit > 100
    for number, fits in ((limit, True), (limit + 1, False)):
        again = check(skd(vllm={"max_num_seqs": number}), **tight)[1]
        assert ("max_num_seqs" not in (again.remedy or "")) == fits


def test_a_trainer_that_does_not_fit_is_told_what_helps():
    found = check(ALL_LOGITS, **{"train.micro_batch_size": 32})[2]
    assert found.level == "failed"
    assert found.remedy.startswith("lower openrlhf.train.micro_batch_size")
    assert "gradient_checkpointing" in found.remedy and "zero_stage=3" in found.remedy


def test_dynamic_batches_count_tokens():
    dynamic = {"train.dynamic_batch_enable": True, "train.micro_batch_size": 32, "data.max_len": 1024}
    found = check(**dynamic, **{"train.max_tokens_per_gpu": 100_000})[2]
    assert found.level == "failed" and found.remedy.startswith("lower openrlhf.train.max_tokens_per_gpu")
    padded = check(**{"train.micro_batch_size": 4, "data.max_len": 1024})[2]
    assert check(**dynamic, **{"train.max_tokens_per_gpu": 4096})[2].found == padded.found
    longest = check(**{"train.micro_batch_size": 1, "data.max_len": 1024})[2]
    assert check(**dynamic, **{"train.max_tokens_per_gpu": 512})[2].found == longest.found


@pytest.mark.parametrize("batches", [{"train.micro_batch_size": 4}, {"train.max_tokens_per_gpu": 1024}])
def test_a_ring_shares_the_tokens_of_a_batch(sizes, batches):
    changes = {"data.max_len": 4096, "train.dynamic_batch_enable": "train.max_tokens_per_gpu" in batches, **batches}
    alone, ring = (
        make_budget(*sizes, skd(), options(**changes, **{"ds.ring_attn_size": ranks}), cpu=False, device=GPU)
        for ranks in (1, 4)
    )
    assert alone.trainer.activations == 4 * ring.trainer.activations


def test_layers_spread_over_actors_leave_embeddings_and_logits_whole(sizes):
    alone, spread = (
        make_budget(
            *sizes,
            ALL_LOGITS,
            options(**{"ds.zero_stage": 0, "actor.num_gpus_per_node": 4, "ds.tensor_parallel_size": ranks}),
            cpu=False,
            device=GPU,
        ).trainer
        for ranks in (1, 4)
    )
    student = sizes[1]
    layers = 2 * (student.parameters - student.embeddings)
    assert alone.weights - spread.weights == pytest.approx(layers * 3 / 4, abs=8)
    assert spread.logits == alone.logits


def test_colocated_models_share_the_device():
    changes = {"train.micro_batch_size": 2, "train.colocate_all": True, "rollout.batch_size": 8}
    assert check(ALL_LOGITS, **changes, **{"vllm.gpu_memory_utilization": 0.5})[2].level == "ok"
    tight = check(ALL_LOGITS, **changes)[2]
    assert tight.level == "failed" and tight.remedy.startswith(
        "openrlhf.vllm.enable_sleep=true; openrlhf.ds.enable_sleep"
    )
    assert "lower openrlhf.vllm.gpu_memory_utilization" in tight.remedy


def test_models_that_sleep_take_turns_on_the_device(sizes):
    """Of a sleeping engine CUDA's own memory stays, of a trainer the weights; the rest is pinned elsewhere."""
    changes = {"train.micro_batch_size": 2, "train.colocate_all": True, "rollout.batch_size": 8}
    asleep = {"vllm.enable_sleep": True, "ds.enable_sleep": True}
    needs = [_need(check(**changes, **sleep)[2].found) for sleep in ({}, asleep)]
    parts = make_budget(*sizes, skd(), options(**changes), cpu=False, device=GPU)
    trainer, engine = parts.trainer, parts.engine
    assert needs[0] == in_gib(trainer.total + engine.peak)
    assert needs[1] == in_gib(max(trainer.total + GIB, engine.peak + trainer.weights + trainer.buffers))
    (line,) = [f.found for f in check(**changes, **asleep) if f.name == "ordinary memory (estimate)"]
    ranks = options()["actor.num_gpus_per_node"]
    assert f"sleeping engines {in_gib(ranks * (engine.teacher + engine.student))}" in line
    assert f"sleeping trainers {in_gib(ranks * (trainer.gradients + trainer.optimizer))}" in line


def _need(found: str) -> str:
    return found.split("on the same GPU ")[1].split(" of ")[0]


def test_without_a_device_there_are_needs_and_no_verdict():
    findings = check(device=None)
    assert set(levels(findings).values()) == {"ok"}
    assert "room for" not in findings[1].found


def test_a_reference_model_is_said_not_to_be_counted():
    assert "not counted" in check(**{"algo.kl.init_coef": 0.01})[2].found
    assert "not counted" not in check()[2].found


def test_on_a_cpu_all_share_one_memory():
    run = dict(cpu=True, device=64 * GIB)
    changes = {"actor.num_gpus_per_node": 1, "data.max_len": 64, "ds.zero_stage": 0}
    assert check_memory(SMALL, SMALL, skd(), options(**changes), **run)[1].level == "ok"
    assert check_memory(BIG, SMALL, skd(), options(**changes), cpu=True, device=8 * GIB)[1].level == "failed"
    short = skd(vllm={"kv_cache_memory_bytes": 1 << 20})
    found = check_memory(SMALL, SMALL, short, options(**changes), **run)[1]
    assert found.level == "failed" and "kv_cache_memory_bytes" in found.remedy


def test_an_architecture_that_is_not_known_is_no_failure():
    class Unknown:
        def get_text_config(self):
            raise AttributeError("no such thing")

    (found,) = check_memory(Unknown(), SMALL, skd(), options(), cpu=False, device=GPU)
    assert found.level == "warning" and "not estimated" in found.found


def test_whether_the_teacher_fits_twice():
    assert fits_twice(BIG, skd(), options(), 80 * GIB)
    assert not fits_twice(BIG, skd(), options(), 30 * GIB)


def test_units():
    assert in_gib(1.5 * GIB) == "1.5 GiB"
    assert in_gib(3 << 20) == "3.0 MiB"
