"""Trained weights arrive in the engine's student, also where a model has other names in memory than on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skd_plugin.models import response_logits
from tests.conftest import EOS, VOCAB, _make_tokenizer
from tests.rules import make_rule

pytestmark = pytest.mark.engine


def test_a_teacher_that_moves(tiny_pair: Path, tmp_path: Path) -> None:
    """New weights of the teacher are in its log-probabilities, and the student stays as it is."""
    from transformers import AutoModelForCausalLM

    from skd_plugin.engine.offline import SKDEngine
    from tests.specs import make_spec

    options = {"max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 256}
    teacher, student = str(tiny_pair / "teacher"), str(tiny_pair / "student")
    spec = make_spec(teacher=teacher, student=student, draft_len=2, max_len=48, teacher_top_k=8, options=options)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (teacher, student)]
    torch.manual_seed(0)
    for parameter in models[0].parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = [(name, parameter.data) for name, parameter in models[0].named_parameters()]
    engine = SKDEngine(replace(spec, teacher_moves=True))
    engine._llm.collective_rpc("load_teacher", args=(weights,))
    for sample in engine.generate([[1, 5, 6], [1, 9, 8, 7]], make_rule(top_k=4), 24, seed=1):
        ids = sample.trace.response_ids.tolist()
        known = sample.trace.teacher_logp, sample.trace.student_logp
        for model, found in zip(models, known, strict=True):
            logp = response_logits(model, sample.prompt_ids, ids).log_softmax(-1)
            expected = logp.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_student_with_other_names_in_memory(tiny_pair: Path, tmp_path: Path) -> None:
    """GPT-NeoX: after the sync the engine's log-probabilities are those of the new weights in transformers.

    A trainer is another process, and newer vLLM changes transformers' classes in its own: the trainer's part is first.
    """
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    from skd_plugin.engine.offline import SKDEngine
    from skd_plugin.host import on_cpu
    from tests.specs import make_spec

    on_cpu.install()
    from skd_plugin.host import weight_sync

    shape = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    for name in ("first", "trained"):
        AutoModelForCausalLM.from_config(shape).float().save_pretrained(tmp_path / name)
        _make_tokenizer().save_pretrained(tmp_path / name)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).eval()
    sent = [bucket.unpack(weight_sync.flatten(trained, weights)) for bucket, weights in weight_sync.buckets(trained)]
    text = "abcdef = fedcba"
    ids = [*_make_tokenizer()(text, add_special_tokens=False).input_ids, EOS]
    prompts = [[1, 5, 6], [1, 9, 8, 7]]
    expected = [response_logits(trained, prompt, ids).log_softmax(-1) for prompt in prompts]

    options = {"max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 256}
    teacher, student = str(tiny_pair / "teacher"), str(tmp_path / "first")
    spec = make_spec(teacher=teacher, student=student, draft_len=2, max_len=48, teacher_top_k=8, options=options)
    engine = SKDEngine(spec)
    for weights in sent:
        engine.load_student(weights)
    rule = make_rule(top_k=VOCAB, reference_share=1.0)
    for sample, logp in zip(engine.generate(prompts, rule, 24, texts=[text] * 2), expected, strict=True):
        assert sample.trace.response_ids.tolist() == ids
        own = logp.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        torch.testing.assert_close(sample.trace.student_logp, own, atol=1e-4, rtol=0)
