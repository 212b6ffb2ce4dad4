"""Both models see what transformers lets them see, whatever windows their layers have, far beyond them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skd_plugin.errors import RecipeError
from skd_plugin.prepare.model_checks import check_attention
from tests.conftest import EOS, VOCAB, _make_tokenizer
from tests.rules import make_rule

pytestmark = pytest.mark.engine
WINDOW = 16
TOLERANCE = 1e-4
PROMPTS = [[1, 5 + i, 6, 7, 8 + i] for i in range(6)]


def config(kind: str, layers: int, window: int = WINDOW) -> Any:
    from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig

    shape = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, initializer_range=0.3, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    if kind == "full":
        return LlamaConfig(**shape, tie_word_embeddings=False)
    if kind == "window":
        return MistralConfig(**shape, sliding_window=window, tie_word_embeddings=False)
    gemma = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[kind]
    return gemma(**shape, sliding_window=window, query_pre_attn_scalar=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`model(kind, role)`: the folder of a random model, which attends far from uniformly."""
    from transformers import AutoModelForCausalLM

    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, role: str) -> Path:
        if (kind, role) not in made:
            made[kind, role] = folder = tmp_path_factory.mktemp("models") / kind
            torch.manual_seed({"teacher": 1, "student": 2}[role])
            layers = {"gemma3": 6}.get(kind, {"teacher": 2, "student": 2}[role])  # the sixth of Gemma 3 is a full one
            AutoModelForCausalLM.from_config(config(kind, layers)).float().save_pretrained(folder)
            _make_tokenizer().save_pretrained(folder)
        return made[kind, role]

    return make


PAIRS = [
    ("window", "full"), ("full", "window"), ("window", "window"), ("gemma2", "full"), ("full", "gemma2"),
    ("gemma3", "gemma2"), ("window", "gemma3"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=["/".join(pair) for pair in PAIRS])
def test_log_probabilities_are_those_of_transformers(model, teacher: str, student: str) -> None:
    from transformers import AutoModelForCausalLM

    from skd_plugin.engine.offline import SKDEngine
    from tests.specs import make_spec

    folders = {"teacher": model(teacher, "teacher"), "student": model(student, "student")}
    options = {"max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 256}
    names = {role: str(folder) for role, folder in folders.items()}
    engine = SKDEngine(make_spec(**names, draft_len=3, max_len=80, teacher_top_k=8, options=options))
    samples = engine.generate(PROMPTS, make_rule(top_k=4), 60, seed=1)
    assert max(len(sample.trace) for sample in samples) > WINDOW + 10
    for role, folder in folders.items():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for sample in samples:
            ids = sample.trace.response_ids.long()
            with torch.no_grad():
                logits = plain(torch.tensor([sample.prompt_ids + ids.tolist()])).logits[0]
            expected = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
            torch.testing.assert_close(getattr(sample.trace, f"{role}_logp"), expected, atol=TOLERANCE, rtol=0)


def test_what_one_engine_cannot_hold_is_refused_by_name() -> None:
    from transformers import Llama4TextConfig

    for teacher, student in (("window", "full"), ("gemma2", "gemma3"), ("full", "full"), ("gemma3", "window")):
        check_attention({"teacher": config(teacher, 6), "student": config(student, 2)})
    for teacher, student in (("window", "window"), ("gemma2", "window"), ("window", "gemma3")):
        with pytest.raises(RecipeError, match="the teacher's is 24 tokens, the student's is 16 tokens"):
            check_attention({"teacher": config(teacher, 6, window=24), "student": config(student, 6)})
    with pytest.raises(RecipeError, match="the teacher has layers of chunked_attention"):
        check_attention({"teacher": Llama4TextConfig(num_hidden_layers=4), "student": config("full", 2)})
