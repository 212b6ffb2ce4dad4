"""Which students' heads are read chunk by chunk, that they give what OpenRLHF's Actor gives, and what it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from skd_plugin.core.chunked import HeadLoss
from skd_plugin.core.losses import forward_kl, top_k_loss
from skd_plugin.core.targets import Targets
from tests.peak_bytes import PeakBytes

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
READ = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "qwen3, experts": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "phi3": transformers.Phi3Config(**SIZES),
    "gemma 3": transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8),
}
CHANGED = {
    "gemma 2": transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "phi, a bias": transformers.PhiConfig(**SIZES),
}
VOCAB = 50  # of the 60 rows


@pytest.fixture(scope="module", autouse=True)
def host():
    """OpenRLHF can be imported on a CPU only after `install`. Its entropy is compiled for 20 s, and not ours."""
    from skd_plugin.host import on_cpu

    on_cpu.install()
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    import skd_plugin.host.chunked_actor as ours

    monkeypatch.setattr(ours, "FEW_LOGITS", 0)


def make_actor(model: torch.nn.Module, *, packed: bool = False, **options: Any):
    from openrlhf.models import Actor

    from skd_plugin.host.chunked_actor import ChunkedActor

    actor = ChunkedActor(model, **{"chunk": 4, "vocab": VOCAB, **options}) if options.get("chunk", 4) else Actor(model)
    actor.packing_samples = packed
    return actor


def make_model(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.config.use_cache = False  # as OpenRLHF's Actor does where it loads a model
    return model


class Batch:
    """Three sequences, the last of them without a response."""

    def __init__(self, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, vocab, (3, 12), generator=generator)
        self.attention = (torch.arange(12) < torch.tensor([12, 7, 5])[:, None]).long()
        self.mask = torch.zeros(3, 11, dtype=torch.long)
        self.mask[0, 4:11] = self.mask[1, 2:4] = 1

    def run(self, actor: Any, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs, entropies) of the response tokens."""
        found, output = actor(
            self.ids, self.mask, attention_mask=self.attention, return_output=True, return_entropy=True, **others
        )
        return found[self.mask.bool()], output.entropy[self.mask.bool()]


def gradients(model: torch.nn.Module, found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    log_probs, entropies = found
    ((log_probs * torch.linspace(-1, 1, len(log_probs))).sum() + entropies.sum()).backward()
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", READ)
def test_numbers_and_gradients_are_the_hosts(family: str, packed: bool) -> None:
    """Of the tokens that both models have: the host's, with the other rows of its head put out of reach."""
    model, batch = make_model(READ[family]), Batch()
    actor = make_actor(model, packed=packed)
    assert actor.reads_head
    ours = batch.run(actor)
    our_gradients = gradients(model, ours)
    without_padding = model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: logits.masked_fill(torch.arange(logits.shape[-1]) >= VOCAB, -1e9)
    )
    theirs = batch.run(make_actor(model, packed=packed, chunk=None))
    their_gradients = gradients(model, theirs)
    without_padding.remove()
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", CHANGED)
def test_logits_that_are_more_than_a_product_are_the_hosts(family: str) -> None:
    model, batch = make_model(CHANGED[family]), Batch()
    actor = make_actor(model)
    assert not actor.reads_head
    for found, wanted in zip(batch.run(actor), batch.run(make_actor(model, chunk=None)), strict=True):
        assert torch.equal(found, wanted)
    logits = actor(batch.ids, batch.mask, attention_mask=batch.attention, return_output=True)[1]["logits"]
    assert logits.shape == (3, 12, 60)


def test_adapters_leave_the_head_to_be_read() -> None:
    """Its own, too: test_full_vocabulary.py compares values and gradients."""
    from peft import LoraConfig, get_peft_model

    model = make_model(READ["llama"])
    elsewhere = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert make_actor(elsewhere).reads_head
    on_head = get_peft_model(make_model(READ["llama"]), LoraConfig(target_modules=["lm_head"], r=2))
    assert make_actor(on_head).reads_head


def test_a_change_that_nobody_knows_of_is_seen() -> None:
    model, batch = make_model(READ["llama"]), Batch()
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output["logits"] = output["logits"] * 0.5
        return output

    model.forward = scaled
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM\) changes what its output head .* skd.loss.chunk=null"):
        batch.run(make_actor(model))
    batch.run(make_actor(model, chunk=None))


@pytest.mark.parametrize("alone", [True, False])
def test_a_step_holds_the_logits_of_one_chunk(alone: bool) -> None:
    """Bytes of a top-K step behind the student's body: of all logits, and of a chunk's with the head's gradient."""
    rows, length, vocab, chunk, top_k = 4, 129, 4096, 32, 64
    count = rows * (length - 1)
    model = make_model(transformers.LlamaConfig(**SIZES | {"vocab_size": vocab, "max_position_embeddings": 256}))
    ids = torch.randint(3, vocab, (rows, length))
    mask, attention = torch.ones(rows, length - 1), torch.ones(rows, length, dtype=torch.long)
    entries = torch.randn(count, top_k + 1).log_softmax(-1)
    token = ids[:, 1:].flatten()
    targets = Targets(
        teacher_ids_NK=torch.randint(0, vocab, (count, top_k)),
        teacher_logp_NK=entries[:, :-1],
        teacher_rest_N=entries[:, -1],
        token_N=token,
        token_teacher_logp_N=entries[:, 0],
        token_student_logp_N=entries[:, 0],
        teacher_entropy_N=entries[:, 0],
        source_N=torch.zeros(count, dtype=torch.uint8),
    )
    divergence = top_k_loss(forward_kl)

    def step(actor: Any, **asked: Any) -> torch.Tensor:
        log_probs, output = actor(ids, mask, attention_mask=attention, return_output=True, **asked)
        losses = output["token_losses"] if asked else divergence(output["logits"][:, :-1].flatten(0, 1), targets)
        return losses.mean() + (0 if alone else 0.1 * log_probs.mean())

    with PeakBytes() as plain:
        step(make_actor(model, chunk=None)).backward()
    model.zero_grad()
    loss = HeadLoss(lambda at, log_q: divergence(log_q, targets.select(at)), torch.ones(count) if alone else None)
    with PeakBytes() as ours:
        step(make_actor(model, chunk=chunk, vocab=vocab), head_loss=loss).backward()
    assert plain.bytes > 18 * count * vocab
    assert ours.bytes < 26 * chunk * vocab + 10 * vocab * SIZES["hidden_size"] + 2**21


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma 2"])
def test_tokens_that_end_a_turn_are_one(family: str, packed: bool) -> None:
    """Whether the head is read or the model changes its logits: log-probs, entropies and gradients of the joined."""
    ends, vocab = (7, 3, 20), SIZES["vocab_size"]
    model, batch = make_model((READ | CHANGED)[family]), Batch()
    batch.ids[(batch.ids == 3) | (batch.ids == 20)] = 4  # which are never sampled
    batch.ids[0, 8] = ends[0]  # a response token
    exact = make_model((READ | CHANGED)[family]).double()
    actor = make_actor(model, packed=packed, vocab=vocab, end_ids=ends)
    assert actor.reads_head == (family == "llama")
    ours = batch.run(actor)
    our_gradients = gradients(model, ours)
    probs = exact(batch.ids, attention_mask=batch.attention).logits[:, :-1].softmax(-1)
    others = [token for token in range(vocab) if token not in ends]
    joined = torch.cat([probs[..., others], probs[..., list(ends)].sum(-1, keepdim=True)], -1).log()
    order = {token: place for place, token in enumerate([*others, ends[0]])}
    places = torch.tensor([[order.get(token, 0) for token in row] for row in batch.ids[:, 1:].tolist()])
    mask = batch.mask.bool()
    theirs = joined.gather(2, places[..., None]).squeeze(2)[mask], -(joined.exp() * joined).sum(-1)[mask]
    their_gradients = gradients(exact, theirs)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient.double(), their_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_trained_model_lists_all_that_end_its_turn(tmp_path) -> None:
    model = make_model(READ["llama"])
    make_actor(model, end_ids=(7, 3))
    model.save_pretrained(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [7, 3]
