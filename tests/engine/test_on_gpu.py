"""What a CPU has not: CUDA graphs, sleep, experts that take new weights, and bfloat16 as it is trained and sampled.

`scripts/gpu_acceptance.sh` runs it with `-s`, so that the gaps that are printed here stand in its report.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skd_plugin.check.self_test import NARROW
from tests.conftest import EOS, VOCAB, _make_tokenizer
from tests.rules import make_rule

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; scripts/gpu_acceptance.sh runs it"),
]

PROMPTS = [[1, 5 + i % 20, 6, 7 + i % 9] for i in range(32)]
SMALL = {"max_num_seqs": 32, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 1024}
MAX_LEN = 64


def draw(engine: Any) -> list[Any]:
    return engine.generate(PROMPTS, make_rule(top_k=4), 32, seed=1)


def tokens(samples: list[Any]) -> list[list[int]]:
    return [sample.trace.response_ids.tolist() for sample in samples]


def test_cuda_graphs_give_the_tokens_of_eager_kernels(engine: Callable[..., Any]) -> None:
    """Of the same seeds, in float32, where both round alike but for the last bits."""
    graphs = engine(4, enforce_eager=False)
    mode = graphs._llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    assert mode.name != "NONE", "this engine has no CUDA graphs, so there is nothing to compare"
    assert tokens(draw(graphs)) == tokens(draw(engine(4)))


def test_an_engine_that_slept_goes_on_as_before(tiny_pair: Path) -> None:
    """Level 1: both models leave the GPU and come back; then the draft model takes new weights."""
    from skd_plugin.engine.offline import SKDEngine
    from tests.specs import make_spec

    names = {role: str(tiny_pair / role) for role in ("teacher", "student")}
    options = {**SMALL, "enable_sleep_mode": True}
    engine = SKDEngine(make_spec(**names, draft_len=4, max_len=MAX_LEN, teacher_top_k=8, options=options))
    before = tokens(draw(engine))
    free = torch.cuda.mem_get_info()[0]
    engine._llm.sleep(level=1)
    assert torch.cuda.mem_get_info()[0] > free, "nothing has left the GPU"
    engine._llm.wake_up()
    assert tokens(draw(engine)) == before
    trained = synchronise(engine, random_model("llama", seed=7, hidden=32), torch.float32)
    assert gaps(trained, draw(engine)).max() < 1e-3


def config(kind: str, hidden: int) -> Any:
    from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

    shape = dict(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2 if hidden > 32 else 1,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32, initializer_range=0.3,
        max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    if kind == "qwen3_moe":
        return Qwen3MoeConfig(**shape, moe_intermediate_size=hidden, num_experts=4, num_experts_per_tok=2)
    if kind == "mixtral":
        return MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    return LlamaConfig(**shape)


def random_model(kind: str, seed: int, hidden: int = 64) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(kind, hidden)).float()


def synchronise(engine: Any, trained: Any, dtype: torch.dtype) -> Any:
    """Hands the engine's draft model these weights, as a trainer does; returns the model that has them."""
    from skd_plugin.host import on_cpu

    on_cpu.install()  # without a GPU the host's imports need it
    from skd_plugin.host import weight_sync

    trained = trained.to(engine_device(), dtype).eval()
    for bucket, parameters in weight_sync.buckets(trained):
        engine.load_student(bucket.unpack(weight_sync.flatten(trained, parameters)))
    return trained


def engine_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def gaps(model: Any, samples: list[Any]) -> torch.Tensor:
    """|log-prob of the engine's student - that of transformers| of every response token; nats."""
    found = []
    for sample in samples:
        ids = sample.trace.response_ids.long()
        logits = model(torch.tensor([sample.prompt_ids + ids.tolist()], device=model.device)).logits[0].float().cpu()
        expected = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        found.append((sample.trace.student_logp - expected).abs())
    return torch.cat(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
def test_new_weights_are_those_of_transformers(kind: str, dtype: str, tmp_path: Path) -> None:
    """Experts too: as the trainer has them in memory, as their checkpoint has them, as the engine's kernels want them.

    In bfloat16 a router's choice between two experts may fall the other way, so that a few tokens are far off: there
    the median is asked for.
    """
    from skd_plugin.engine.offline import SKDEngine
    from tests.specs import make_spec

    roles = {"teacher": random_model(kind, seed=3), "student": random_model(kind, seed=1)}  # experts want experts
    for role, model in roles.items():
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path / role)
        _make_tokenizer().save_pretrained(tmp_path / role)
    names, shape = {role: str(tmp_path / role) for role in roles}, {"draft_len": 2, "max_len": MAX_LEN}
    engine = SKDEngine(make_spec(**names, **shape, teacher_top_k=8, options={**SMALL, "dtype": dtype}))
    trained = synchronise(engine, random_model(kind, seed=2), getattr(torch, dtype))
    samples = draw(engine)
    found, old = gaps(trained, samples), gaps(roles["student"].to(trained.device), samples)
    print(
        f"\ngap of {kind} in {dtype} after a weight sync, nats a token: median {found.median():.2g}, mean "
        f"{found.mean():.2g}, largest {found.max():.2g}; from the weights before {old.median():.2g}"
    )
    assert old.median() > 0.1, "the two sets of weights hardly differ, so that nothing is shown"
    if dtype == "float32":
        assert found.max() < 1e-3
    else:
        assert found.median() < NARROW.gap / 5
