"""Packed sequences and dynamic batches: the same log-probabilities and the same updates as with padding.

Gradients are judged by norms and weights. The losses of a step cannot see one that is wrong.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers

from skd_plugin.core.layout import ResponseLayout
from tests.contract.ranks import run_ranks

STAGES = {1: ("0", "1"), 2: ("2", "3")}  # of ZeRO, by the number of ranks
CASES = ["top-k", "top-k, reweighted", "top-k, sequence mean", "top-k and rewards", "whole vocabulary",
         "whole vocabulary and rewards"]  # fmt: skip
TRAINED = [("0", case) for case in CASES] + [("2", case) for case in CASES]
TRAINED += [(stage, case) for stage in ("1", "3") for case in ("top-k", "whole vocabulary and rewards")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What packed_run.py found, by stage, case and layout: one process and, beside it, two."""
    folder = tmp_path_factory.mktemp("packing")
    run_ranks("packed_run", {folder / str(ranks): (ranks, stages) for ranks, stages in STAGES.items()})
    return {k: v for ranks in STAGES for k, v in json.loads((folder / str(ranks) / "packed.json").read_text()).items()}


@pytest.mark.parametrize("layout", ["packed", "dynamic"])
@pytest.mark.parametrize(("stage", "case"), TRAINED)
def test_updates_are_those_of_padded_batches(trained: dict[str, dict], stage: str, case: str, layout: str) -> None:
    padded, found = (trained[f"{stage}, {case}, {name}"] for name in ("padded", layout))
    assert _distance(found, padded) < 2e-4
    assert found["norms"] == pytest.approx(padded["norms"], rel=1e-4)
    assert found["losses"] == pytest.approx(padded["losses"], rel=1e-5)
    assert all(rows == 1 for rows, _ in found["shapes"]), "nothing was packed"
    assert any(rows > 1 for rows, _ in padded["shapes"])
    assert len(found["shapes"]) > 1, "an update of one micro-batch shows no accumulation"


RINGED = [("2", case) for case in CASES if case in ("top-k", "top-k and rewards")]
RINGED += [("2", "whole vocabulary"), ("3", "top-k"), ("3", "whole vocabulary and rewards")]


@pytest.mark.parametrize("layout", ["ring", "ring, dynamic"])
@pytest.mark.parametrize(("stage", "case"), RINGED)
def test_updates_of_a_ring_are_those_of_padded_batches(
    trained: dict[str, dict], stage: str, case: str, layout: str
) -> None:
    """Two ranks share each sequence, with a stand-in for the attention between them; padded, each has its own."""
    padded, found = (trained[f"{stage}, {case}, {name}"] for name in ("padded", layout))
    assert _distance(found, padded) < 2e-4
    assert found["norms"] == pytest.approx(padded["norms"], rel=1e-4)
    assert found["losses"] == pytest.approx(padded["losses"], rel=1e-5)
    assert all(rows == 1 for rows, _ in found["shapes"]) and len(found["shapes"]) > 1


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_updates_of_the_critic_in_dynamic_batches(trained: dict[str, dict], stage: str) -> None:
    assert _distance(trained[f"{stage}, critic, dynamic"], trained[f"{stage}, critic, padded"]) < 2e-4


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_host_alone_forgets_all_but_the_last_micro_batch(trained: dict[str, dict], stage: str) -> None:
    """Why SKDActorTrainer and DynamicCriticTrainer tell DeepSpeed its boundary; fails when the host does it itself."""
    assert _distance(trained[f"{stage}, host's critic"], trained[f"{stage}, critic, padded"]) > 0.1


def _distance(found: dict, wanted: dict) -> float:
    """Of two updates, relative to their size."""
    return math.dist(found["update"], wanted["update"]) / math.hypot(*wanted["update"])


SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral, window": transformers.MistralConfig(**SIZES, sliding_window=4),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "qwen3, experts": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "gemma 2": transformers.Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "gemma 3": transformers.Gemma3TextConfig(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_do_not_see_each_other(family: str) -> None:
    """Without flash-attn, transformers finds the sequences by their position ids, if it fills no cache."""
    from openrlhf.models import Actor

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa").eval()
    model.config.use_cache = False  # as OpenRLHF's Actor does where it loads a model
    lengths = [9, 4, 1, 12]
    ids = torch.randint(3, 60, (len(lengths), max(lengths)))
    attention = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    alone = [model(row[:length][None]).logits[0] for row, length in zip(ids, lengths, strict=True)]
    actor = Actor(model)
    actor.packing_samples = True
    output = actor(ids, None, attention_mask=attention, return_output=True)
    assert output["logits"].shape[:2] == (1, sum(lengths))
    assert torch.allclose(output["logits"][0], torch.cat(alone), atol=2e-5)
    mask = torch.zeros(len(lengths), max(lengths) - 1)
    mask[0, 3:8] = mask[1, 1:3] = mask[3, 8:11] = 1
    log_probs = actor(ids, mask, attention_mask=attention)
    layout = ResponseLayout.packed(mask, attention)
    ours = layout.predictions(output["logits"]).log_softmax(-1).gather(1, layout.tokens(ids)[:, None]).squeeze(1)
    assert torch.allclose(layout.take(log_probs), ours, atol=1e-6) and len(layout) == 10
