"""The distillation loss in OpenRLHF's place: which tokens it trains, and that batching does not change it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from skd_plugin.core.losses import LossSettings, make_divergence, make_token_loss, top_k_loss
from skd_plugin.core.trace import Source, Trace
from tests.traces import trace_of

VOCAB, TEACHER_ENTRIES = 20, 5
LOSSES = {kind: top_k_loss(make_divergence(kind, beta=0.5, alpha=0.1)) for kind in ("forward_kl", "reverse_kl")}


@pytest.fixture(scope="session", autouse=True)
def importable_host() -> None:
    """OpenRLHF can be imported on a CPU only after `install`."""
    from skd_plugin.host import on_cpu

    on_cpu.install()


def even(trace: Trace) -> torch.Tensor:
    return torch.ones(len(trace))


def batches(weighting=even, replaced_tokens: str = "exclude", packed: bool = False):
    """What makes the micro-batches of an optimizer step."""
    from skd_plugin.host.batch import OptimizerStepBatches

    return OptimizerStepBatches(weighting, replaced_tokens, packed=packed)


def token_losses(logits, sequences, mask, traces, loss) -> torch.Tensor:
    """Loss of every response token as a per-token tensor [B, T - 1]."""
    from skd_plugin.host.distillation import TopKDistillation

    batch = batches().batch_of(experience_of(sequences, mask, traces))
    return batch.layout.spread(TopKDistillation(loss).token_losses(batch, {"logits": logits}))


def make_trace(response: list[int], generator: torch.Generator) -> Trace:
    """A trace with random teacher entries; what the loss does not read is empty of meaning."""
    count = len(response)
    teacher = torch.randn(count, VOCAB, generator=generator).mul(2).log_softmax(-1)
    logp, ids = teacher.topk(TEACHER_ENTRIES, dim=-1)
    token = torch.tensor(response)[:, None]
    tail = teacher.scatter(1, ids, float("-inf"))
    return trace_of(
        token.squeeze(1),
        teacher_logp=teacher.gather(1, token).squeeze(1),
        teacher_topk_ids=ids.to(torch.int32),
        teacher_topk_logp=logp,
        teacher_rest_tempered=tail.scatter(1, token, float("-inf")).logsumexp(-1),
    )


class Batch:
    """Sequences of prompt + response + padding in the host's layout: masks have one entry less than tokens."""

    def __init__(self, lengths: list[tuple[int, int]], width: int | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = width or max(sum(pair) for pair in lengths)
        self.sequences = torch.zeros(len(lengths), width, dtype=torch.long)
        self.action_mask = torch.zeros(len(lengths), width - 1, dtype=torch.long)
        self.traces = []
        for row, (prompt, response) in enumerate(lengths):
            ids = torch.randint(1, VOCAB, (prompt + response,), generator=generator)
            self.sequences[row, : len(ids)] = ids
            self.action_mask[row, prompt - 1 : prompt + response - 1] = 1
            self.traces.append(make_trace(ids[prompt:].tolist(), generator))
        logits = torch.randn(len(lengths), 32, VOCAB, generator=generator)[:, :width]
        self.logits = logits.clone().requires_grad_()

    def rows(self, *rows: int) -> tuple:
        index = list(rows)
        return self.logits[index], self.sequences[index], self.action_mask[index], [self.traces[i] for i in index]

    @property
    def all(self) -> tuple:
        return self.rows(*range(len(self.traces)))


LENGTHS = [(3, 4), (2, 1), (5, 6)]


def reference(logits_TV: torch.Tensor, trace: Trace, prompt_len: int, kind: str) -> torch.Tensor:
    """Loss of each response token by the definition, in probability space and float64."""
    values = []
    for index in range(len(trace)):
        q = torch.exp(logits_TV[prompt_len - 1 + index].double())
        q = q / q.sum()
        ids, token = trace.teacher_topk_ids[index].tolist(), int(trace.response_ids[index])
        named, logp = list(ids), trace.teacher_topk_logp[index].tolist()
        if token not in ids:
            named, logp = [*ids, token], [*logp, trace.teacher_logp[index].item()]
        p = torch.tensor(logp, dtype=torch.float64).exp()
        p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
        q = torch.cat([q[named], q.sum()[None] - q[named].sum()[None]])
        a, b = (p, q) if kind == "forward_kl" else (q, p)
        values.append(sum(x * torch.log(x / y) for x, y in zip(a, b, strict=True)))
    return torch.stack(values)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_values_are_those_of_the_definition(kind: str) -> None:
    batch = Batch(LENGTHS)
    values = token_losses(*batch.all, LOSSES[kind])
    assert values.shape == batch.action_mask.shape
    for row, (prompt, response) in enumerate(LENGTHS):
        expected = reference(batch.logits[row].detach(), batch.traces[row], prompt, kind)
        found = values[row, prompt - 1 : prompt + response - 1].detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_only_positions_before_response_tokens_are_trained(kind: str) -> None:
    """Position t - 1 predicts token t: from the last prompt token to the last response token but one."""
    batch = Batch(LENGTHS, width=14)
    values = token_losses(*batch.all, LOSSES[kind])
    assert (values[~batch.action_mask.bool()] == 0).all()
    values.sum().backward()
    touched = batch.logits.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    for row, (prompt, response) in enumerate(LENGTHS):
        expected[row, prompt - 1 : prompt + response - 1] = True
    assert touched.tolist() == expected.tolist()


def test_feedback_between_two_turns_is_not_trained() -> None:
    """The joined traces of two turns belong to the two spans of the mask, in order."""
    batch = Batch([(2, 7)])
    whole = batch.traces[0]
    batch.action_mask[0, 3:6] = 0  # tokens 4 to 6 are the environment's
    batch.traces[0] = Trace.join([whole.slice(0, 2), whole.slice(5, 7)])
    values = token_losses(*batch.all, LOSSES["forward_kl"])
    expected = reference(batch.logits[0].detach(), whole, 2, "forward_kl")
    expected[2:5] = 0
    torch.testing.assert_close(values[0, 1:].detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing() -> None:
    narrow, wide = Batch(LENGTHS), Batch(LENGTHS, width=20)
    assert torch.equal(narrow.logits, wide.logits[:, :11])
    for batch in (narrow, wide):
        token_losses(*batch.all, LOSSES["forward_kl"]).sum().backward()
    torch.testing.assert_close(wide.logits.grad[:, :11], narrow.logits.grad, rtol=0, atol=0)
    assert not wide.logits.grad[:, 11:].any()


def test_truncated_sequence_uses_the_first_tokens_of_its_trace() -> None:
    """The host cuts a sequence at max_len, its mask with it; the trace still holds the whole response."""
    whole, cut = Batch([(3, 6)]), Batch([(3, 6)])
    full = token_losses(*whole.all, LOSSES["forward_kl"])
    logits, sequences, mask, traces = cut.all
    short = token_losses(logits[:, :6], sequences[:, :6], mask[:, :5], traces, LOSSES["forward_kl"])
    assert short.shape == (1, 5)
    torch.testing.assert_close(short, full[:, :5], rtol=0, atol=0)


@pytest.mark.parametrize("change", ["token", "mask", "order"])
def test_tokens_that_are_not_the_traces_raise(change: str) -> None:
    batch = Batch([(3, 4), (3, 4)])
    if change == "token":
        batch.sequences[0, 5] = (batch.sequences[0, 5] + 1) % VOCAB
    elif change == "mask":
        batch.action_mask[0] = batch.action_mask[0].roll(-1)
    else:
        batch.traces.reverse()
    with pytest.raises(RuntimeError, match=r"not those of its traces; .* must never decode and re-tokenise"):
        token_losses(*batch.all, LOSSES["forward_kl"])


def test_batch_without_a_response_token_still_runs_its_backward() -> None:
    batch = Batch([(3, 4), (2, 2)])
    batch.action_mask.zero_()
    values = token_losses(*batch.all, LOSSES["forward_kl"])
    assert values.shape == batch.action_mask.shape and not values.any()
    values.sum().backward()
    assert batch.logits.grad is not None and not batch.logits.grad.any()


def test_response_may_be_empty_in_one_row() -> None:
    batch = Batch(LENGTHS)
    batch.action_mask[1].zero_()
    values = token_losses(*batch.all, LOSSES["forward_kl"])
    alone = token_losses(*Batch(LENGTHS).rows(0, 2), LOSSES["forward_kl"])
    torch.testing.assert_close(values[[0, 2]], alone, rtol=0, atol=0)
    assert not values[1].any()


def all_options(kind: str):
    settings = LossSettings(kind, 0.5, 0.1, replaced_kind="cross_entropy", replaced_weight=0.5, clamp=4.0)
    return make_token_loss(settings, vocab=VOCAB)


def test_every_option_reaches_its_tokens() -> None:
    """Hard label on replaced tokens, divergence on the others, wherever they stand in the batch."""
    batch = Batch(LENGTHS)
    for trace in batch.traces:
        trace.source[::2] = Source.REPLACED
        trace.source[3:4] = Source.FLAGGED
    values = token_losses(*batch.all, all_options("forward_kl"))
    for row, (prompt, response) in enumerate(LENGTHS):
        trace, logits = batch.traces[row], batch.logits[row, prompt - 1 : prompt + response - 1].detach().double()
        hard = -logits.log_softmax(-1).gather(1, trace.response_ids.long()[:, None]).squeeze(1)
        soft = reference(batch.logits[row].detach(), trace, prompt, "forward_kl")
        replaced = torch.tensor([code in (Source.REPLACED, Source.FLAGGED) for code in trace.source.tolist()])
        expected = torch.where(replaced, 0.5 * hard.clamp(max=4), soft.clamp(max=4))
        found = values[row, prompt - 1 : prompt + response - 1].detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0.0, float("inf"), float("nan")])
def test_batch_without_a_response_token_has_a_graph_whatever_the_loss(padding: float) -> None:
    batch = Batch([(3, 4), (2, 2)])
    batch.action_mask.zero_()
    with torch.no_grad():
        batch.logits[:, -1] = padding
    values = token_losses(*batch.all, all_options("jsd"))
    assert values.shape == batch.action_mask.shape and not values.any()
    values.sum().backward()
    assert batch.logits.grad is not None and not batch.logits.grad.any()


def test_weight_zero_keeps_its_tokens_in_the_mean() -> None:
    """A weight scales a token's loss, and not the number of tokens that the host divides by."""
    batch = Batch(LENGTHS)
    for trace in batch.traces:
        trace.source[::2] = Source.REPLACED
    plain = token_losses(*batch.all, LOSSES["forward_kl"]).detach()
    loss = make_token_loss(LossSettings("forward_kl", 0.5, 0.1, replaced_weight=0.0))
    values = token_losses(*batch.all, loss)
    kept = [
        plain[row, prompt - 1 : prompt + response - 1] * (batch.traces[row].source != Source.REPLACED)
        for row, (prompt, response) in enumerate(LENGTHS)
    ]
    from openrlhf.models import aggregate_loss

    expected = {True: torch.cat(kept).sum() / 11, False: torch.stack([row.mean() for row in kept]).mean()}
    for token_level, wanted in expected.items():
        found = aggregate_loss(values, batch.action_mask, token_level_loss=token_level)
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-7)


# --- in OpenRLHF's place ---


class Student(torch.nn.Module):
    """An actor whose training forward returns given logits."""

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return torch.zeros(()), {"logits": logits}


def objective(loss, token_level: bool = True):
    """What a training step minimises, with the distillation loss alone."""
    from skd_plugin.host.distillation import TopKDistillation
    from skd_plugin.host.objective import Coefficients, Objective

    found = Objective(TopKDistillation(loss), None, token_level)
    found.begin_step(Coefficients(kd=1.0, rl=0.0))
    return found


def experience_of(sequences: torch.Tensor, mask: torch.Tensor, traces: list[Trace]) -> SimpleNamespace:
    return SimpleNamespace(sequences=sequences, action_mask=mask, info={"skd": traces})


def value_of(whole, experience, logits: torch.Tensor, **totals) -> tuple:
    """OpenRLHF's two calls of a training step: the actor, then the loss function."""
    student = Student()
    with whole.step(student, experience) as loss:
        log_probs, _ = student(logits)
        return loss(log_probs, None, None, action_mask=experience.action_mask, rollout_log_probs=None, **totals)


def step(batch: Batch, micro_batches: list[list[int]], token_level: bool) -> torch.Tensor:
    """Gradient of one optimizer step, as OpenRLHF and DeepSpeed accumulate it over micro-batches."""
    whole = objective(LOSSES["forward_kl"], token_level)
    count = len(micro_batches)
    logits_of = {}
    experiences = []
    for rows in micro_batches:
        logits, *others = batch.rows(*rows)
        experiences.append(experience_of(*others))
        logits_of[id(experiences[-1])] = logits
    for experience, totals in batches()(experiences, SimpleNamespace(), count, lambda e: e.action_mask):
        value, *_ = value_of(whole, experience, logits_of[id(experience)], **totals)
        (value / count).backward()  # DeepSpeed divides by the number of micro-batches
    gradient, batch.logits.grad = batch.logits.grad, None
    return gradient


@pytest.mark.parametrize("token_level", [True, False])
def test_micro_batches_sum_to_the_whole(token_level: bool) -> None:
    """The gradient of a step does not depend on how its sequences are split, however uneven they are."""
    batch = Batch([(3, 9), (2, 1), (5, 6), (4, 2)])
    whole = step(batch, [[0, 1, 2, 3]], token_level)
    for split in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 0], [2, 1]]):
        torch.testing.assert_close(step(batch, split, token_level), whole, rtol=1e-5, atol=1e-7)
    assert whole.abs().sum() > 0


def test_token_mean_and_sequence_mean() -> None:
    """Token mean: every token weighs the same; sequence mean: every sequence does."""
    batch = Batch(LENGTHS)
    values = token_losses(*batch.all, LOSSES["forward_kl"]).detach()
    per_row = [values[row][batch.action_mask[row].bool()] for row in range(3)]
    expected = {True: torch.cat(per_row).mean(), False: torch.stack([v.mean() for v in per_row]).mean()}
    for token_level, value in expected.items():
        logits, *others = batch.all
        experience = experience_of(*others)
        experience.batch = batches().batch_of(experience)
        found, *rest = value_of(objective(LOSSES["forward_kl"], token_level), experience, logits)
        torch.testing.assert_close(found.detach(), value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(experience.info["skd_loss"], expected[True], rtol=1e-5, atol=1e-7)
        assert len(rest) == 4 and rest[2:] == [None, None] and not any(r.requires_grad for r in rest[:2])


def test_a_step_leaves_nothing_behind() -> None:
    """Neither a hook on the student, also after an error, nor token losses for another batch."""
    batch, student, whole = Batch(LENGTHS), Student(), objective(LOSSES["forward_kl"])
    experience = experience_of(*batch.all[1:])
    experience.batch = batches().batch_of(experience)
    with whole.step(student, experience) as loss, pytest.raises(RuntimeError, match="there are no token losses"):
        loss(torch.zeros(()), None, None, action_mask=batch.action_mask, rollout_log_probs=None)
    with pytest.raises(ZeroDivisionError), whole.step(student, experience):
        raise ZeroDivisionError
    assert not student._forward_hooks and not student._forward_pre_hooks


def test_a_step_without_coefficients_is_an_error() -> None:
    from skd_plugin.host.distillation import TopKDistillation
    from skd_plugin.host.objective import Objective

    whole = Objective(TopKDistillation(LOSSES["forward_kl"]), None, True)
    with pytest.raises(RuntimeError, match="no coefficients yet"), whole.step(Student(), SimpleNamespace()):
        pass


@pytest.mark.parametrize("kind", list(LOSSES))
def test_whole_pipeline_on_a_tiny_llama(kind: str) -> None:
    """OpenRLHF's Actor and a step of ours give the loss and gradient of a float64 model fed row by row."""
    from openrlhf.models import Actor
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    exact = LlamaForCausalLM(config).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})

    batch = Batch(LENGTHS, width=13, seed=4)
    actor = Actor(model)
    actor.packing_samples = False
    attention = torch.zeros_like(batch.sequences)
    for row, lengths in enumerate(LENGTHS):
        attention[row, : sum(lengths)] = 1
    experience = experience_of(batch.sequences, batch.action_mask, batch.traces)
    experience.batch = batches().batch_of(experience)
    with objective(LOSSES[kind]).step(actor, experience) as loss:
        log_probs, _ = actor(batch.sequences, batch.action_mask, attention_mask=attention, return_output=True)
        value, *_ = loss(log_probs, None, None, action_mask=batch.action_mask, rollout_log_probs=None)
    value.backward()

    total = torch.zeros((), dtype=torch.float64)
    for row, (prompt, response) in enumerate(LENGTHS):
        logits = exact(batch.sequences[row : row + 1, : prompt + response]).logits[0]
        total = total + reference(logits, batch.traces[row], prompt, kind).sum()
    (total / sum(response for _, response in LENGTHS)).backward()
    expected = total.detach() / sum(response for _, response in LENGTHS)
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-4, atol=1e-6)
    for (name, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=2e-3, atol=2e-5, msg=name)
