"""Training with an output head that is read chunk by chunk, in the host's real Actor.

It equals training with all logits in memory: on the teacher's top-K on the same traces, over the whole vocabulary on
traces with all V entries.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skd_plugin.core.losses import LossSettings, make_token_loss, top_k_loss, whole_vocabulary_loss
from skd_plugin.core.trace import Trace
from skd_plugin.models import load_output_head
from tests.conftest import VOCAB
from tests.traces import trace_of
from tests.unit.test_distillation import batches

LENGTHS = [(3, 4), (2, 1), (5, 6)]
WAYS = {"top_k": 7, "full": VOCAB}  # entries of the teacher in the traces of what it equals
LOSSES = {
    "forward_kl": LossSettings("forward_kl", 0.3, 0.1),
    "reverse_kl": LossSettings("reverse_kl", 0.3, 0.1, temperature=2.0),
    "jsd": LossSettings("jsd", 0.3, 0.1, replaced_kind="cross_entropy", replaced_weight=0.5, clamp=3.0),
}


def kinds_of(way: str) -> list[str]:
    """The traces have the teacher's tail at temperature 1, so that other temperatures need all entries."""
    return [kind for kind, loss in LOSSES.items() if loss.temperature == 1 or way == "full"]


@pytest.fixture(scope="session")
def modules():
    """The modules under test; OpenRLHF can be imported on a CPU only after `install`."""
    from skd_plugin.host import on_cpu

    on_cpu.install()
    import skd_plugin.host.batch
    import skd_plugin.host.chunked_actor
    import skd_plugin.host.distillation
    import skd_plugin.host.objective

    return skd_plugin.host


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """OpenRLHF compiles its entropy, which takes 20 s and has nothing of ours in it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def small_chunks(modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.chunked_actor, "FEW_LOGITS", 0)


@pytest.fixture
def student(hf_models):
    return deepcopy(hf_models["student"])


def make_actor(modules, model: torch.nn.Module, chunked: bool = True, packed: bool = False, chunk: int | None = 3):
    from openrlhf.models import Actor

    actor = modules.chunked_actor.ChunkedActor(model, chunk=chunk, vocab=VOCAB) if chunked else Actor(model)
    actor.packing_samples = packed
    return actor


class Batch:
    """Prompts and responses of the tiny pair, with left and right padding, and the teacher's whole word on them."""

    @torch.no_grad()
    def __init__(self, teacher: torch.nn.Module, top_k: int = VOCAB, packed: bool = False) -> None:
        lengths = LENGTHS
        self.packed = packed
        generator = torch.Generator().manual_seed(3)
        width = max(map(sum, lengths)) + 2
        self.sequences = torch.zeros(len(lengths), width, dtype=torch.long)
        self.attention = torch.zeros_like(self.sequences)
        self.action_mask = torch.zeros(len(lengths), width - 1, dtype=torch.long)
        traces = []
        for row, (prompt, response) in enumerate(lengths):
            ids = torch.randint(3, VOCAB, (prompt + response,), generator=generator)
            span = slice(row, row + len(ids))  # as many padding tokens before it as there are rows above
            self.sequences[row, span], self.attention[row, span] = ids, 1
            self.action_mask[row, row + prompt - 1 : row + prompt + response - 1] = 1
            hidden = teacher.model(ids[None]).last_hidden_state[0, prompt - 1 : -1]
            traces.append(make_trace(ids[prompt:], hidden, teacher.lm_head.weight, top_k))
        self.traces = traces
        self.weights = torch.rand(self.action_mask.shape, generator=generator)

    @property
    def experience(self) -> SimpleNamespace:
        found = SimpleNamespace(**self.inputs, info={"skd": self.traces})
        made = batches(packed=self.packed).batch_of(found)
        found.batch = replace(made, token_weights_N=made.layout.take(self.weights))
        return found

    @property
    def inputs(self) -> dict:
        return dict(sequences=self.sequences, action_mask=self.action_mask, attention_mask=self.attention)


def make_trace(response: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, top_k: int) -> Trace:
    """With `top_k` teacher entries, at temperature 1; what the losses do not read is empty of meaning."""
    logp = torch.nn.functional.linear(hidden, head).log_softmax(-1)
    top_logp, ids = logp.topk(top_k, dim=-1)
    rest = logp.scatter(1, ids, float("-inf")).scatter(1, response[:, None], float("-inf")).logsumexp(-1)
    return trace_of(
        response,
        source=(torch.arange(len(response)) % 2).to(torch.uint8),  # kept and replaced
        teacher_logp=logp.gather(1, response[:, None]).squeeze(1),
        teacher_topk_ids=ids.to(torch.int32),
        teacher_topk_logp=top_logp,
        teacher_rest_tempered=rest,
        teacher_hidden=hidden,
    )


def make_objective(modules, head: torch.Tensor, kind: str, way: str | None, by_token: bool = True, alone: bool = True):
    """The distillation loss alone, from a head read in chunks (a name of `WAYS`), or from all logits."""
    parts = modules.distillation
    token_loss = make_token_loss(LOSSES[kind], against=whole_vocabulary_loss if way == "full" else top_k_loss)
    foresight = parts.Foresight(token_level_loss=by_token, alone=alone)
    distillation = parts.TopKDistillation(token_loss)
    if way == "top_k":
        distillation = parts.ChunkedTopKDistillation(token_loss, foresight)
    if way == "full":
        distillation = parts.FullVocabularyDistillation({"teacher": head}, token_loss, foresight, chunk=3, vocab=VOCAB)
    objective = modules.objective.Objective(distillation, None, by_token)
    objective.begin_step(modules.objective.Coefficients(kd=1.0, rl=0.0))
    return objective


def run_step(objective, actor, batch: Batch, return_entropy: bool = False, **totals):
    """(loss, log-probs, output) of OpenRLHF's two calls in a training step."""
    with objective.step(actor, batch.experience) as loss:
        log_probs, output = actor(**batch.inputs, return_output=True, return_entropy=return_entropy)
        value, *_ = loss(log_probs, None, None, action_mask=batch.action_mask, rollout_log_probs=None, **totals)
    return value, log_probs, output


def train(modules, hf_models, kind: str, way: str, chunked: bool, *, by_token=True, rl=0.0, entropy=0.0, packed=False):
    """(loss, log-probs, gradients by name) of one batch."""
    model, teacher = deepcopy(hf_models["student"]), hf_models["teacher"]
    actor = make_actor(modules, model, chunked, packed)
    head = teacher.lm_head.weight.detach()
    objective = make_objective(modules, head, kind, way if chunked else None, by_token, alone=not rl)
    batch = Batch(teacher, WAYS[way], packed)
    loss, log_probs, output = run_step(objective, actor, batch, bool(entropy))
    loss = loss + rl * (log_probs * torch.linspace(-1, 1, log_probs.shape[1])).sum()
    if entropy:
        loss = loss + entropy * (output.entropy * batch.action_mask).sum()
    loss.backward()
    return loss.detach(), log_probs.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("by_token", "packed"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("rl", "entropy"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize(("kind", "way"), [(kind, way) for way in WAYS for kind in kinds_of(way)])
def test_a_training_step_is_the_one_of_all_logits(
    modules, hf_models, kind, way, rl, entropy, by_token, packed
) -> None:
    settings = dict(by_token=by_token, rl=rl, entropy=entropy, packed=packed)
    loss, log_probs, gradients = train(modules, hf_models, kind, way, True, **settings)
    right_loss, right_log_probs, right = train(modules, hf_models, kind, way, False, **settings)
    torch.testing.assert_close(loss, right_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_probs, right_log_probs, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == right.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-3, atol=1e-5, msg=name)
        assert gradient.any(), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by_token", [True, False])
def test_the_gradient_is_foreseen(
    modules, hf_models, by_token: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of distillation alone no chunk is computed twice, whatever the weights and the reduction."""
    import skd_plugin.core.chunked as chunked

    calls = []
    real = chunked._log_softmax
    monkeypatch.setattr(chunked, "_log_softmax", lambda *args: calls.append(len(args[0])) or real(*args))
    tokens = sum(response for _, response in LENGTHS)
    heads, check = (2, tokens) if way == "full" else (1, 0)  # the teacher's, too; fewer than 16 tokens are all checked
    train(modules, hf_models, "forward_kl", way, True, by_token=by_token)
    assert sum(calls) == heads * tokens + check
    calls.clear()
    train(modules, hf_models, "forward_kl", way, True, by_token=by_token, rl=0.5)
    assert sum(calls) == 2 * heads * tokens + check


def test_other_forwards_are_the_hosts(modules, student, hf_models) -> None:
    batch = Batch(hf_models["teacher"])
    found, output = {}, {}
    for chunked in (True, False):
        actor = make_actor(modules, student, chunked)
        with torch.no_grad():
            found[chunked] = actor(**batch.inputs)
            log_probs, output[chunked] = actor(**batch.inputs, return_output=True, return_entropy=True)
        assert torch.equal(log_probs, found[chunked])
        assert "forward" not in vars(student.lm_head)
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5)
    mask = batch.action_mask
    torch.testing.assert_close(output[True].entropy * mask, output[False].entropy * mask, rtol=1e-5, atol=1e-5)


def test_no_logits_of_the_batch(modules, student, hf_models) -> None:
    actor = make_actor(modules, student)
    batch = Batch(hf_models["teacher"])
    _, output = actor(**batch.inputs, return_output=True)
    assert output["logits"].shape == (*batch.sequences.shape, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_head_gets_both_gradients(modules, hf_models, way: str) -> None:
    from transformers import LlamaForCausalLM

    config = type(hf_models["student"].config)(
        **{**hf_models["student"].config.to_dict(), "tie_word_embeddings": True}
    )
    torch.manual_seed(0)
    tied = {"student": LlamaForCausalLM(config), "teacher": hf_models["teacher"]}
    assert tied["student"].lm_head.weight is tied["student"].model.embed_tokens.weight
    _, _, gradients = train(modules, tied, "forward_kl", way, True)
    _, _, right = train(modules, tied, "forward_kl", way, False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["q_proj"]])
@pytest.mark.parametrize("rl", [0.0, 0.5])
@pytest.mark.parametrize("way", WAYS)
def test_a_student_with_adapters(modules, hf_models, way: str, targets: list[str], rl: float) -> None:
    """An adapted head is the one that is read, with its dropout; a frozen one gets no gradient."""
    from skd_plugin.adapters import LoraOptions, with_adapters

    found = {}
    for chunked in (True, False):
        torch.manual_seed(0)
        adapted = with_adapters(deepcopy(hf_models["student"]), LoraOptions(2, 4, 0.3, targets)).train()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.3)
        torch.manual_seed(1)  # of the dropout
        found[chunked] = train(modules, {**hf_models, "student": adapted}, "forward_kl", way, chunked, rl=rl)
    (loss, log_probs, gradients), (right_loss, right_log_probs, right) = found[True], found[False]
    torch.testing.assert_close(loss, right_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_probs, right_log_probs, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        if ".lora_" in name:
            torch.testing.assert_close(gradient, right[name], rtol=1e-3, atol=1e-5, msg=name)
            assert gradient.any(), name
        else:
            assert gradient is None and right[name] is None, name


def test_an_adapter_of_another_type_than_its_head(modules, hf_models) -> None:
    """At ZeRO-3 peft's adapters stay float32 beside a model in bfloat16."""
    from skd_plugin.adapters import LoraOptions, with_adapters

    found = []
    for chunked in (True, False):
        torch.manual_seed(0)
        model = deepcopy(hf_models["student"]).to(torch.bfloat16)
        adapted = with_adapters(model, LoraOptions(2, 4, 0.0, ["lm_head"]))
        out = adapted.get_output_embeddings().lora_B["default"].weight
        assert out.dtype == torch.float32
        torch.nn.init.normal_(out.data, std=0.1)
        teacher = {"teacher": hf_models["teacher"], "student": adapted}
        loss, _, gradients = train(modules, teacher, "forward_kl", "full", chunked)
        found.append((loss, *(gradient for gradient in gradients.values() if gradient is not None)))
    for ours, right in zip(*found, strict=True):
        assert ours.dtype == right.dtype == torch.float32
        assert (ours - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_without_a_response_token_has_a_gradient_of_zero(modules, student, hf_models, way: str) -> None:
    """Every ZeRO rank must run its backward."""
    teacher = hf_models["teacher"]
    batch = Batch(teacher)
    batch.action_mask.zero_()
    batch.traces = [trace.slice(0, 0) for trace in batch.traces]
    objective = make_objective(modules, teacher.lm_head.weight.detach(), "forward_kl", way)
    loss, *_ = run_step(objective, make_actor(modules, student), batch, batch_num_tokens=torch.tensor(5.0))
    loss.backward()
    assert not any(p.grad is None or p.grad.any() for p in student.parameters())


def test_a_forward_outside_of_a_step_has_no_loss(modules, student, hf_models) -> None:
    teacher = hf_models["teacher"]
    batch, actor = Batch(teacher), make_actor(modules, student)
    value, *_ = run_step(make_objective(modules, teacher.lm_head.weight.detach(), "forward_kl", "full"), actor, batch)
    assert value > 0
    _, output = actor(**batch.inputs, return_output=True)
    assert not output["token_losses"].any()


def test_another_head_than_the_engines_teacher_raises(modules, student, hf_models) -> None:
    teacher = hf_models["teacher"]
    objective = make_objective(modules, 0.5 * teacher.lm_head.weight.detach(), "forward_kl", "full")
    with pytest.raises(RuntimeError, match=r"nats from those of the engine .* skd.loss.vocabulary=top_k"):
        run_step(objective, make_actor(modules, student), Batch(teacher))


def test_tokens_that_are_not_the_traces_raise(modules, hf_models) -> None:
    batch = Batch(hf_models["teacher"])
    batch.sequences[0, 5] += 1
    with pytest.raises(RuntimeError, match="not those of its traces"):
        _ = batch.experience


# --- the teacher's head from its checkpoint ---


def saved(folder: Path, tied: bool, form: str) -> tuple[Path, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="2KB" if "sharded" in form else "1GB")
    if "bin" in form:
        import json

        from safetensors.torch import load_file

        files = {p.name: load_file(p) for p in folder.glob("*.safetensors")}
        for name, content in files.items():
            torch.save(content, folder / name.replace("model", "pytorch_model").replace("safetensors", "bin"))
            (folder / name).unlink()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            places = json.loads(index.read_text().replace("safetensors", "bin").replace("model-", "pytorch_model-"))
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(places))
            index.unlink()
    return folder, model.get_output_embeddings().weight.detach()


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_head_is_read_from_every_form_of_checkpoint(modules, tmp_path: Path, tied: bool, form: str) -> None:
    folder, weight = saved(tmp_path, tied, form)
    head = load_output_head(str(folder), torch.float32, "cpu")
    assert torch.equal(head, weight)
    assert load_output_head(str(folder), torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_checkpoint_without_the_head_raises(modules, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = saved(tmp_path, False, "safetensors")
    content = load_file(folder / "model.safetensors")
    del content["lm_head.weight"]
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"has no tensor lm_head.weight"):
        load_output_head(str(folder), torch.float32, "cpu")
