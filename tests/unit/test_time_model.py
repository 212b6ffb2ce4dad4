"""The estimates of time against numbers worked out by hand, and the tokens of a block against a simulation."""

from __future__ import annotations

import random

import pytest
from time_model import (
    BANDWIDTH_SHARE,
    BLOCK_S,
    FORWARD_S,
    MICRO_BATCH_S,
    NETWORK,
    PREFILL_SHARE,
    STEP_S,
    TRAINING_SHARE,
    UPDATE_S,
    Gpu,
    StepTime,
    block_seconds,
    forward_seconds,
    rollout_seconds,
    sync_seconds,
    tokens_per_block,
    training_seconds,
)

from skd_plugin.check.memory_model import ModelSize

GPU = Gpu("round", flops=1e15, bandwidth=1e12, memory=10**11, link=1e11)
READ = 1e12 * BANDWIDTH_SHARE  # bytes a second


def size(billions: float) -> ModelSize:
    """With a cache of 2 x 10 x 2 x 100 x 2 = 8,000 bytes a token."""
    return ModelSize(
        int(billions * 1e9), layers=10, hidden=8, intermediate=8, heads=4, kv_heads=2, head_dim=100, vocabulary=8
    )


BIG, SMALL = size(7), size(0.5)


# --- tokens of a block ---


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1.0, 5.0), (0.5, 1.9375), (0.9, 4.0951)])
def test_tokens_of_a_block_by_hand(rate: float, expected: float) -> None:
    """gamma = 5: at 0 the teacher's one, at 1 all five and no bonus; (1 - 0.5^5) / 0.5; (1 - 0.9^5) / 0.1."""
    assert tokens_per_block(rate, 5) == pytest.approx(expected)


def test_tokens_of_a_block_by_simulation() -> None:
    generator, rate, draft_len, blocks = random.Random(0), 0.7, 4, 20_000
    total = 0
    for _ in range(blocks):
        kept = next((n for n in range(draft_len) if generator.random() >= rate), draft_len)
        total += min(kept + 1, draft_len)  # a replacement, unless all were kept
    assert total / blocks == pytest.approx(tokens_per_block(rate, draft_len), abs=0.03)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        tokens_per_block(rate, 5)


# --- the rollout ---


def test_a_small_forward_reads_its_weights_and_cache() -> None:
    assert forward_seconds(BIG, GPU, tokens=6, cached=0) == pytest.approx(14e9 / READ + FORWARD_S)
    assert forward_seconds(BIG, GPU, tokens=6, cached=1e6) == pytest.approx((14e9 + 8e9) / READ + FORWARD_S)
    split = forward_seconds(BIG, GPU, tokens=6, cached=0, tensor_parallel=2)
    assert split == pytest.approx(7e9 / READ + FORWARD_S)


def test_a_large_forward_computes() -> None:
    expected = 2 * 7e9 * 10_000 / (1e15 * PREFILL_SHARE) + FORWARD_S
    assert forward_seconds(BIG, GPU, tokens=10_000, cached=0) == pytest.approx(expected)


def test_a_block_is_drafts_and_one_check() -> None:
    found = block_seconds(BIG, SMALL, GPU, requests=2, context=500, draft_len=5)
    draft = (1e9 + 1000 * 8000) / READ + FORWARD_S
    check = (14e9 + 1000 * 8000) / READ + FORWARD_S
    assert found == pytest.approx(5 * draft + check + BLOCK_S)


def test_the_check_is_of_gamma_plus_one_tokens_a_request() -> None:
    """With 2,000 requests the teacher computes: 12,000 tokens."""
    found = block_seconds(BIG, SMALL, GPU, requests=2000, context=0, draft_len=5)
    draft = max(1e9 / READ, 2 * 0.5e9 * 2000 / (1e15 * PREFILL_SHARE)) + FORWARD_S
    check = 2 * 7e9 * 12_000 / (1e15 * PREFILL_SHARE) + FORWARD_S
    assert found == pytest.approx(5 * draft + check + BLOCK_S)


ROLLOUT = dict(prompt_len=100, response_len=200, draft_len=4, acceptance=1.0)


def test_a_rollout_is_prompts_and_blocks() -> None:
    found = rollout_seconds(BIG, SMALL, GPU, requests=3, at_once=8, **ROLLOUT)
    prefill = sum(forward_seconds(model, GPU, tokens=300, cached=0) for model in (BIG, SMALL))
    block = block_seconds(BIG, SMALL, GPU, requests=3, context=200, draft_len=4)
    assert found == pytest.approx(prefill + 50 * block)


def test_requests_without_room_wait_for_the_next_wave() -> None:
    one = rollout_seconds(BIG, SMALL, GPU, requests=4, at_once=4, **ROLLOUT)
    assert rollout_seconds(BIG, SMALL, GPU, requests=8, at_once=4, **ROLLOUT) == pytest.approx(2 * one)
    assert rollout_seconds(BIG, SMALL, GPU, requests=7, at_once=4, **ROLLOUT) == pytest.approx(2 * one)


def test_fewer_accepted_proposals_take_more_blocks() -> None:
    """1.9375 tokens a block instead of 5: 52 blocks instead of 20 for 100 tokens."""
    run = dict(requests=1, at_once=1, prompt_len=0, response_len=100, draft_len=5)
    block = block_seconds(BIG, SMALL, GPU, requests=1, context=50, draft_len=5)
    fast, slow = (rollout_seconds(BIG, SMALL, GPU, acceptance=rate, **run) for rate in (1.0, 0.5))
    assert slow - fast == pytest.approx(32 * block)


# --- training and the way back ---

TRAINING = dict(
    sequences=64,
    sequence_len=1000,
    updates=1,
    ranks=4,
    across_nodes=False,
    micro_batch=8,
    checkpointing=False,
    rollout_logp=False,
)


def test_training_by_hand() -> None:
    """6 x 0.5e9 x 64,000 FLOPs on four GPUs, two micro-batches each; 1 GB of gradients out and 1 GB of weights in."""
    found = training_seconds(SMALL, GPU, **TRAINING)
    flops = 6 * 0.5e9 * 64_000 / (4 * 1e15 * TRAINING_SHARE)
    update = 2 * 1e9 / 1e11 + 2 * 8e9 / 4 / READ + UPDATE_S
    assert found == pytest.approx(flops + 2 * MICRO_BATCH_S + update)


def test_checkpointing_and_rewards_are_further_forwards() -> None:
    forward = 2 * 0.5e9 * 64_000 / (4 * 1e15 * TRAINING_SHARE)
    plain = training_seconds(SMALL, GPU, **TRAINING)
    for name in ("checkpointing", "rollout_logp"):
        assert training_seconds(SMALL, GPU, **TRAINING | {name: True}) == pytest.approx(plain + forward)


def test_several_nodes_talk_over_the_network() -> None:
    one, two = (training_seconds(SMALL, GPU, **TRAINING | {"across_nodes": across}) for across in (False, True))
    assert two - one == pytest.approx(2e9 / NETWORK - 2e9 / 1e11)
    assert sync_seconds(SMALL, GPU, across_nodes=False) == pytest.approx(1e9 / 1e11)
    assert sync_seconds(SMALL, GPU, across_nodes=True) == pytest.approx(1e9 / NETWORK)


def test_one_rank_talks_to_nobody() -> None:
    alone = TRAINING | {"ranks": 1}
    flops = 6 * 0.5e9 * 64_000 / (1e15 * TRAINING_SHARE)
    assert training_seconds(SMALL, GPU, **alone) == pytest.approx(
        flops + 8 * MICRO_BATCH_S + 2 * 8e9 / READ + UPDATE_S
    )


def test_the_parts_of_a_step_follow_each_other() -> None:
    assert StepTime(rollout=2.0, train=1.0, sync=0.5).total == pytest.approx(3.5 + STEP_S)
