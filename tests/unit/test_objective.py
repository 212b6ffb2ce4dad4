"""The two losses of a step: which tokens each one trains, and that neither dilutes the other."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from skd_plugin.core.clock import Clock
from skd_plugin.core.trace import Source
from tests.unit.test_distillation import LOSSES, Batch, Student, batches, even, token_losses

LENGTHS = [(3, 4), (2, 3), (4, 6)]


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    from skd_plugin.host import on_cpu

    on_cpu.install()
    from openrlhf.models import PolicyLoss

    from skd_plugin.host import distillation, objective

    return SimpleNamespace(PolicyLoss=PolicyLoss, distillation=distillation, objective=objective)


class Step:
    """One optimizer step of micro-batches on random logits."""

    def __init__(self, parts, sources: dict[tuple[int, int], int], replaced_tokens: str = "exclude", weighting=even):
        self.parts = parts
        self.batch = Batch(LENGTHS)
        for trace in self.batch.traces:
            trace.source[:] = Source.ACCEPTED
        for (row, index), code in sources.items():
            self.batch.traces[row].source[index] = code
        generator = torch.Generator().manual_seed(5)
        shape = self.batch.action_mask.shape
        self.advantages = torch.randn(shape, generator=generator)
        logp = self.batch.logits.detach()[:, :-1].log_softmax(-1)
        self.logp = logp.gather(2, self.batch.sequences[:, 1:, None]).squeeze(2)
        self.old = self.logp + 0.05 * torch.randn(shape, generator=generator)
        self.rollout_logp = self.logp + 0.1 * torch.randn(shape, generator=generator)
        self.batches = batches(weighting, replaced_tokens)

    def gradient(self, kd: float, rl: float, micro_batches=((0, 1, 2),), token_level: bool = True) -> torch.Tensor:
        """Gradient of the logits; `self.infos` and `self.loss` are set on the way."""
        distillation = self.parts.distillation.TopKDistillation(LOSSES["forward_kl"])
        policy = self.parts.PolicyLoss(token_level_loss=token_level)
        objective = self.parts.objective.Objective(distillation, policy, token_level)
        objective.begin_step(self.parts.objective.Coefficients(kd=kd, rl=rl))
        student = Student()
        experiences = []
        for rows in micro_batches:
            _, sequences, mask, traces = self.batch.rows(*rows)
            experiences.append(
                SimpleNamespace(rows=list(rows), sequences=sequences, action_mask=mask, info={"skd": traces})
            )
        self.infos, self.loss = [], 0.0
        count = len(experiences)
        for experience, totals in self.batches(experiences, SimpleNamespace(), count, lambda e: e.action_mask):
            logits = self.batch.logits[experience.rows]
            logp = logits[:, :-1].log_softmax(-1).gather(2, experience.sequences[:, 1:, None]).squeeze(2)
            with objective.step(student, experience) as step_loss:
                student(logits)
                loss, *_ = step_loss(
                    logp,
                    self.old[experience.rows],
                    self.advantages[experience.rows],
                    action_mask=experience.action_mask,
                    rollout_log_probs=self.rollout_logp[experience.rows],
                    **totals,
                )
            (loss / len(experiences)).backward()
            self.loss += loss.item() / len(experiences)
            self.infos.append(experience.info)
        gradient, self.batch.logits.grad = self.batch.logits.grad, None
        return gradient

    def position(self, row: int, index: int) -> tuple[int, int]:
        """Where the logits of a response token are."""
        return row, LENGTHS[row][0] - 1 + index


TEACHERS = {(0, 1): Source.REPLACED, (1, 0): Source.UNDRAFTED, (2, 2): Source.REFERENCE, (2, 3): Source.RESAMPLED}


def test_only_the_students_own_tokens_get_a_policy_gradient(parts) -> None:
    step = Step(parts, {**TEACHERS, (2, 5): Source.FLAGGED})
    gradient = step.gradient(kd=0.0, rl=1.0)
    for row, (_, length) in enumerate(LENGTHS):
        for index in range(length):
            moved = gradient[step.position(row, index)].abs().sum() > 0
            assert moved == ((row, index) not in TEACHERS), (row, index)


def test_replaced_tokens_do_not_dilute_the_policy_loss(parts) -> None:
    """The policy loss is a mean over its own tokens, however many others there are."""
    step = Step(parts, TEACHERS)
    step.gradient(kd=0.0, rl=1.0)
    values = []
    for row, (prompt, length) in enumerate(LENGTHS):
        for index in range(length):
            if (row, index) not in TEACHERS:
                place = (row, prompt - 1 + index)
                ratio, advantage = (step.logp[place] - step.old[place]).exp(), step.advantages[place]
                values.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    assert step.loss == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    assert len(values) == sum(length for _, length in LENGTHS) - len(TEACHERS)


def test_importance_weighted_tokens_are_measured_against_the_distribution_they_came_from(parts) -> None:
    """Ratio q / p for a replaced token, from the rollout's record; only replaced tokens are let in."""
    step = Step(parts, TEACHERS, "importance")
    place = step.position(0, 1)
    step.rollout_logp[place] = step.logp[place] - 0.1
    step.advantages[place] = 1.0
    gradient = step.gradient(kd=0.0, rl=1.0)
    ratio, count = torch.tensor(0.1).exp(), sum(length for _, length in LENGTHS) - 3
    q = step.batch.logits.detach()[place].softmax(-1)
    expected = ratio * q / count
    expected[step.batch.sequences[0, place[1] + 1]] -= ratio / count
    torch.testing.assert_close(gradient[place], expected, rtol=1e-4, atol=1e-6)
    assert gradient[step.position(1, 0)].abs().sum() == 0  # undrafted
    step.rollout_logp[place] = step.logp[place] - 1.0  # a ratio beyond the host's clip
    assert step.gradient(kd=0.0, rl=1.0)[place].abs().sum() == 0


def test_without_a_policy_coefficient_it_is_pure_distillation(parts) -> None:
    """Bit for bit, even where the policy's tensors are not there or not finite."""
    step = Step(parts, TEACHERS)
    pure = step.gradient(kd=1.0, rl=0.0)
    step.advantages[:] = float("nan")
    assert torch.equal(step.gradient(kd=1.0, rl=0.0), pure)
    assert pure.abs().sum() > 0 and "rl_loss" not in step.infos[0]


def test_losses_add_up(parts) -> None:
    step = Step(parts, TEACHERS)
    kd, rl = step.gradient(kd=1.0, rl=0.0), step.gradient(kd=0.0, rl=1.0)
    torch.testing.assert_close(step.gradient(kd=0.3, rl=2.0), 0.3 * kd + 2.0 * rl, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("token_level", [True, False])
def test_micro_batches_sum_to_the_whole(parts, token_level: bool) -> None:
    step = Step(parts, TEACHERS, weighting=lambda trace: trace.response_ids.float() + 0.5)
    whole = step.gradient(1.0, 0.5, token_level=token_level)
    for split in (((0,), (1,), (2,)), ((2, 0), (1,))):
        found = step.gradient(1.0, 0.5, split, token_level=token_level)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def test_weights_have_mean_one_over_the_step(parts) -> None:
    """Scaling the weights changes nothing; the loss is the weighted mean of the token losses."""
    weigh = lambda trace: trace.response_ids.float()  # noqa: E731
    step = Step(parts, {}, weighting=weigh)
    gradient = step.gradient(1.0, 0.0, ((0, 1), (2,)))
    scaled = Step(parts, {}, weighting=lambda trace: 100 * weigh(trace)).gradient(1.0, 0.0, ((0, 1), (2,)))
    torch.testing.assert_close(scaled, gradient, rtol=1e-4, atol=1e-7)
    values = token_losses(*step.batch.all, LOSSES["forward_kl"]).detach()
    mask = step.batch.action_mask.bool()
    weights = torch.cat([weigh(trace) for trace in step.batch.traces])
    assert step.loss == pytest.approx((values[mask] * weights).sum().item() / weights.sum().item(), rel=1e-5)


def test_a_step_without_a_token_of_its_own(parts) -> None:
    """Every token is the teacher's: the policy loss is 0 with a graph, and nothing is NaN."""
    everywhere = {(row, index): Source.REPLACED for row, (_, length) in enumerate(LENGTHS) for index in range(length)}
    step = Step(parts, everywhere)
    gradient = step.gradient(kd=0.0, rl=1.0)
    assert step.loss == 0.0 and gradient.abs().sum() == 0
    assert all(torch.isfinite(value) for value in step.infos[0].values())


def test_an_empty_response_trains_nothing_and_breaks_nothing(parts) -> None:
    step = Step(parts, {})
    step.batch.action_mask[1].zero_()
    step.batch.traces[1] = step.batch.traces[1].slice(0, 0)
    gradient = step.gradient(kd=1.0, rl=1.0)
    assert gradient[1].abs().sum() == 0 and gradient[0].abs().sum() > 0


def test_a_loss_that_is_not_finite_stops_the_run(parts) -> None:
    step = Step(parts, {})
    step.batch.logits.data[0, 3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan .*lower openrlhf\.actor\.adam\.lr"):
        step.gradient(kd=1.0, rl=0.0)


@pytest.mark.parametrize("token_level", [True, False])
def test_an_infinite_loss_without_a_weight_counts_as_nothing(parts, token_level: bool) -> None:
    """`skd.loss.reweight` with a floor of 0 gives such weights."""

    def weigh(trace) -> torch.Tensor:
        return (torch.arange(len(trace)) > 0).float()  # of all responses together

    step = Step(parts, {}, weighting=weigh)
    expected = step.gradient(1.0, 0.0, token_level=token_level)
    value = step.loss
    step.batch.logits.data[(*step.position(0, 0), step.batch.traces[0].teacher_topk_ids[0, 0])] = -torch.inf
    assert token_losses(*step.batch.all, LOSSES["forward_kl"]).isinf().sum() == 1
    torch.testing.assert_close(step.gradient(1.0, 0.0, token_level=token_level), expected)
    assert step.loss == pytest.approx(value, rel=1e-6)
    assert step.infos[0]["skd_loss"].isfinite()


def test_a_student_without_a_token_stops_the_run(parts) -> None:
    """All its logits are -inf: no distribution, so no loss is right."""
    step = Step(parts, {})
    step.batch.logits.data[step.position(1, 1)] = -torch.inf
    with pytest.raises(FloatingPointError, match=r"the loss is nan .*a model's logits are not finite"):
        step.gradient(kd=1.0, rl=0.0)


class _PoisonedBackward(torch.autograd.Function):
    """Its value is its input; one element of its gradient is not finite."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, poison: float) -> torch.Tensor:
        ctx.poison = poison
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        gradient = gradient.clone()
        gradient.view(-1)[3] = ctx.poison
        return gradient, None


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        assert is_boundary is True

    def loss(self, poison: float = 0.0) -> torch.Tensor:
        logits = self.head(self.embeddings(torch.tensor([[1, 2, 3]])).tanh())
        return _PoisonedBackward.apply(logits, poison).logsumexp(-1).sum()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(parts, monkeypatch, poison: float) -> None:
    """In the training step of the policy's own trainer, whose host's part is a forward, a backward and an update."""
    from skd_plugin.host import policy_actor

    model = _Model()
    before = [p.detach().clone() for p in model.parameters()]

    def host_step(trainer, experience) -> dict:
        loss = model.loss(experience.poison)
        assert loss.isfinite()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
        return {}

    monkeypatch.setattr(policy_actor.host.ActorPPOTrainer, "training_step", host_step)
    trainer = object.__new__(policy_actor.SKDActorTrainer)
    trainer.actor, trainer.clock = SimpleNamespace(model=model), Clock()
    trainer.objective = SimpleNamespace(step=lambda student, experience: nullcontext())
    trainer.step = 7
    last = SimpleNamespace(ends_step=True)
    with pytest.raises(FloatingPointError, match=r"the gradient of step 7 is not finite.*Lower openrlhf\.actor"):
        trainer.training_step(SimpleNamespace(poison=poison, batch=last))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for p in model.parameters():
        p.grad = None
    trainer.training_step(SimpleNamespace(poison=0.5, batch=last))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_look_at_gradients_changes_none_and_leaves_nothing_behind(parts) -> None:
    model = _Model()
    plain = torch.autograd.grad(model.loss(0.5), list(model.parameters()))
    with parts.objective.finite_gradients(model.embeddings, 1):
        watched = torch.autograd.grad(model.loss(0.5), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert not model.embeddings._forward_hooks
    model.embeddings.requires_grad_(False)
    with parts.objective.finite_gradients(model.embeddings, 1):
        model.loss(0.5).backward()


def test_nothing_to_learn_is_an_error(parts) -> None:
    with pytest.raises(ValueError, match="kd_coef and rl_coef are both 0"):
        Step(parts, {}).gradient(kd=0.0, rl=0.0)


def test_a_student_that_is_not_the_engines_ends_the_step(parts) -> None:
    """By the first micro-batch of a step, whose student has sampled the text; later ones have moved."""
    step = Step(parts, {})
    experience = SimpleNamespace(
        sequences=step.batch.sequences, action_mask=step.batch.action_mask, info={"skd": step.batch.traces}
    )
    (made, _), *_ = step.batches([experience], SimpleNamespace(), 1, lambda e: e.action_mask)
    batch = made.batch
    batch.tokens.student_logp[:] = batch.layout.take(step.logp) + 0.004 * torch.randn(len(batch.layout))
    distillation = parts.distillation.TopKDistillation(LOSSES["forward_kl"])
    objective = parts.objective.Objective(distillation, None, True, student_tolerance=0.01)
    objective.compare_students(batch, step.logp + 1)  # no step has begun
    objective.begin_step(parts.objective.Coefficients(kd=1.0, rl=0.0))
    objective.compare_students(batch, step.logp)
    objective.compare_students(batch, step.logp + 1)  # after the first one
    objective.begin_step(parts.objective.Coefficients(kd=1.0, rl=0.0))
    batch.tokens.student_logp[0] = float("nan")  # where the student was not asked
    with pytest.raises(
        RuntimeError, match=r"log q of \d+ sampled tokens is -\d.* and -\d.* here, (0\.9|1\.0)\d* nats apart"
    ):
        objective.compare_students(batch, step.logp + 1)
    objective.begin_step(parts.objective.Coefficients(kd=1.0, rl=0.0))
    with pytest.raises(RuntimeError, match="nan nats apart"):
        objective.compare_students(batch, step.logp * float("nan"))
