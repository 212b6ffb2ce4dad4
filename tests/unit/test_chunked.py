"""Divergences from hidden states, chunk by chunk, against whole distributions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from skd_plugin.core.chunked import HeadLoss, PairLoss, Scores, against_teacher, chunked_scores
from skd_plugin.core.losses import (
    LOSSES,
    Divergence,
    LossSettings,
    forward_kl,
    make_divergence,
    make_token_loss,
    soften,
)
from skd_plugin.core.targets import Targets
from skd_plugin.core.trace import Source

N, H, J, V, PADDING = 23, 8, 12, 50, 6
PARAMETERS = {"beta": 0.3, "alpha": 0.1}


def loss_of(divergence: Divergence, temperature: float = 1.0) -> PairLoss:
    """The divergence of both models at `temperature`."""
    return lambda rows, log_p, log_q: divergence(soften(log_p, temperature), soften(log_q, temperature))


class Case:
    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.student = [normal(N, H).requires_grad_(), normal(V, H).requires_grad_()]
        self.teacher = [normal(N, J), normal(V, J)]
        self.tokens = torch.randint(0, V - PADDING, (N,), generator=generator)
        self.weights = torch.rand(N, generator=generator)

    def scores(self, kind: str = "forward_kl", temperature: float = 1.0, expected_N=None, **options) -> Scores:
        hidden, head = self.teacher
        loss = loss_of(make_divergence(kind, **PARAMETERS), temperature)
        loss = HeadLoss(against_teacher(hidden, head[: options.get("vocab")], loss), expected_N)
        options = {"chunk": 5, "entropy": True} | options
        return chunked_scores(*self.student, loss=loss, tokens_N=self.tokens, **options)

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, self.student)


def reference(case: Case, kind: str, vocab: int = V, temperature: float = 1.0) -> tuple[Case, Scores]:
    """The same in float64, with all logits at once and nothing but autograd; and its inputs."""
    exact = Case()
    exact.student = [x.detach().double().requires_grad_() for x in case.student]
    hidden, head = exact.student
    student = hidden @ head[:vocab].T
    teacher = case.teacher[0].double() @ case.teacher[1][:vocab].double().T
    log_q = student.log_softmax(-1)
    divergence = make_divergence(kind, **PARAMETERS)(
        (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    )
    entropy = torch.distributions.Categorical(logits=student).entropy()
    return exact, Scores(log_q[torch.arange(N), case.tokens], entropy, divergence)


def mixed(scores: Scores, weights: torch.Tensor, share: float) -> torch.Tensor:
    """A loss of the divergence alone (share 0) or of everything that the function returns."""
    loss = 3 * (scores.loss * weights).sum()
    return loss + share * ((scores.log_prob * weights.flip(0)).sum() - 2 * scores.entropy.sum()) if share else loss


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("expected", ["nothing", "the gradient", "something else"])
@pytest.mark.parametrize("kind", [kind for kind, loss in LOSSES.items() if loss.divergence])
def test_values_and_gradients_are_those_of_the_whole(kind: str, expected: str, share: float) -> None:
    """Whatever the caller says of the gradient to come, it is the right one."""
    case = Case()
    hint = {"nothing": None, "the gradient": 0.2 * case.weights, "something else": case.weights.flip(0)}[expected]
    found = case.scores(kind, expected_N=hint)
    exact, wanted = reference(case, kind)
    for name, value in found._asdict().items():
        assert value.dtype == torch.float32 and value.shape == (N,)
        torch.testing.assert_close(value.double(), getattr(wanted, name), rtol=1e-4, atol=1e-5, msg=name)
    pairs = zip(
        case.gradients(mixed(found, case.weights, share)),
        exact.gradients(mixed(wanted, case.weights.double(), share)),
        strict=True,
    )
    for gradient, right in pairs:
        torch.testing.assert_close(gradient.double(), right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_of_the_divergence_alone(temperature: float, expected: bool) -> None:
    case = Case()
    found = case.scores(temperature=temperature, expected_N=case.weights if expected else None)
    exact, wanted = reference(case, "forward_kl", temperature=temperature)
    for name, value in found._asdict().items():
        torch.testing.assert_close(value.double(), getattr(wanted, name), rtol=1e-4, atol=1e-5, msg=name)
    right = exact.gradients(mixed(wanted, case.weights.double(), 0))
    for gradient, exact_gradient in zip(case.gradients(mixed(found, case.weights, 0)), right, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("expected", [False, True])
def test_padding_rows_have_no_mass_and_no_gradient(expected: bool) -> None:
    vocab = V - PADDING
    case = Case()
    found = case.scores(vocab=vocab, expected_N=case.weights if expected else None)
    exact, wanted = reference(case, "forward_kl", vocab=vocab)
    torch.testing.assert_close(found.loss.double(), wanted.loss, rtol=1e-4, atol=1e-5)
    _, to_head = case.gradients(mixed(found, case.weights, 0))
    _, right = exact.gradients(mixed(wanted, case.weights.double(), 0))
    torch.testing.assert_close(to_head.double(), right, rtol=1e-3, atol=1e-4)
    assert not to_head[vocab:].any() and to_head[:vocab].any()


@pytest.mark.parametrize("expected", [False, True])
def test_bfloat16_gradient_of_the_head_is_summed_in_float32(expected: bool) -> None:
    """The error is that of one rounding of the sum, and does not grow with the number of chunks."""
    case = Case(torch.bfloat16)
    case.student = [x.detach().repeat(64, 1).requires_grad_() if len(x) == N else x for x in case.student]
    case.teacher[0] = case.teacher[0].repeat(64, 1)
    case.tokens = case.tokens.repeat(64)
    hint = torch.ones(64 * N) if expected else None
    found = case.gradients(case.scores(chunk=3, entropy=False, expected_N=hint).loss.sum())
    whole = [x.detach().float().requires_grad_() for x in case.student]
    log_q = torch.nn.functional.linear(*whole).to(torch.bfloat16).float().log_softmax(-1)
    log_p = torch.nn.functional.linear(*case.teacher).float().log_softmax(-1)
    right = torch.autograd.grad(forward_kl(log_p, log_q).sum(), whole)
    for gradient, exact in zip(found, right, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("name", ["student at 1e4", "teacher at 1e4", "both at 1e4", "teacher masked"])
@pytest.mark.parametrize("kind", [kind for kind, loss in LOSSES.items() if loss.divergence])
def test_extreme_logits_and_an_empty_place_of_the_teacher(kind: str, name: str, expected: bool) -> None:
    """Right and finite; where the divergence is infinite by definition, it is inf, and without a gradient."""
    case = Case()
    if name in ("student at 1e4", "both at 1e4"):
        case.student[0] = (case.student[0].detach() * 2000).requires_grad_()
    if name in ("teacher at 1e4", "both at 1e4"):
        case.teacher[0] = case.teacher[0] * 2000
    if name == "teacher masked":
        case.teacher[0][:, 0], case.teacher[1][3:9] = 1.0, 0.0
        case.teacher[1][3:9, 0] = -math.inf
    found = case.scores(kind, expected_N=torch.ones(N) if expected else None)
    gradients = case.gradients(found.loss.sum())
    exact, wanted = reference(case, kind)
    infinite = name == "teacher masked" and kind in ("reverse_kl", "symmetric_kl", "adaptive_kl")
    assert wanted.loss.isinf().all() if infinite else wanted.loss.isfinite().all()
    coarse = 1e-4 if name == "teacher masked" else 1e-2  # float32 knows numbers of 1e4 to 1e-3
    torch.testing.assert_close(found.loss.double(), wanted.loss, rtol=coarse, atol=coarse)
    torch.testing.assert_close(found.entropy.double(), wanted.entropy, rtol=coarse, atol=coarse)
    for gradient, right in zip(gradients, exact.gradients(wanted.loss.sum()), strict=True):
        assert gradient.isfinite().all() and (gradient.double() - right).norm() <= coarse * right.norm().clamp_min(1.0)


@pytest.mark.parametrize("chunk", [1, 7, N, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    case = Case()
    found, whole = case.scores(chunk=chunk), case.scores(chunk=N)
    torch.testing.assert_close(found.loss, whole.loss)
    for a, b in zip(case.gradients(found.loss.sum()), case.gradients(whole.loss.sum()), strict=True):
        torch.testing.assert_close(a, b)


def test_no_tensor_of_all_logits_is_made() -> None:
    """No operation, forward or backward, gives more than a chunk's logits or a head's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    for hint in (None, torch.ones(N)):
        case = Case()
        with Watch():
            case.gradients(case.scores(chunk=4, expected_N=hint).loss.sum())
    assert 0 < largest <= max(4 * V, V * J) < N * V


def test_a_second_backward_gives_the_same() -> None:
    case = Case()
    loss = case.scores(expected_N=torch.ones(N)).loss.mean()
    first = torch.autograd.grad(loss, case.student, retain_graph=True)
    for a, b in zip(first, case.gradients(loss), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_head_gets_no_gradient() -> None:
    case = Case()
    case.student[1].requires_grad_(False)
    case.scores(expected_N=torch.ones(N)).loss.sum().backward()
    assert case.student[0].grad is not None and case.student[1].grad is None


@pytest.mark.parametrize("hint", [None, torch.ones(0)])
def test_no_token_at_all_still_has_a_gradient_of_zero(hint: torch.Tensor | None) -> None:
    case = Case()
    hidden = torch.zeros(0, H, requires_grad=True)
    loss = HeadLoss(against_teacher(torch.zeros(0, J), case.teacher[1], loss_of(forward_kl)), hint)
    tokens = torch.zeros(0, dtype=torch.int64)
    scores = chunked_scores(hidden, case.student[1], tokens_N=tokens, chunk=4, loss=loss)
    scores.loss.sum().backward()
    assert not case.student[1].grad.any() and hidden.grad.shape == (0, H)


def top_k_case(case: Case, top_k: int, vocab: int) -> Targets:
    """What a rollout with the case's teacher would know; every third emitted token is the teacher's first."""
    log_p = (case.teacher[0] @ case.teacher[1][:vocab].T).double().log_softmax(-1)
    logp, ids = log_p.topk(top_k)
    case.tokens = torch.where(torch.arange(N) % 3 == 0, ids[:, 0], case.tokens)
    token = case.tokens[:, None]
    rest = log_p.scatter(1, ids, -math.inf).scatter(1, token, -math.inf).logsumexp(-1)
    source = torch.where(torch.arange(N) % 2 == 0, int(Source.ACCEPTED), int(Source.REPLACED)).to(torch.uint8)
    token_logp = log_p.gather(1, token).squeeze(1).float()
    return Targets(
        teacher_ids_NK=ids,
        teacher_logp_NK=logp.float(),
        teacher_rest_N=rest.float(),
        token_N=case.tokens,
        token_teacher_logp_N=token_logp,
        token_student_logp_N=token_logp,
        teacher_entropy_N=torch.zeros(N),
        source_N=source,
    )


@pytest.mark.parametrize("share", [0.0, 0.7])
@pytest.mark.parametrize("foreseen", [False, True])
@pytest.mark.parametrize("kind", [*LOSSES, "mixed"])
def test_top_k_losses_are_those_of_all_logits(kind: str, foreseen: bool, share: float) -> None:
    """Values and gradients against the loss of float64 logits, padding rows and rewards included."""
    vocab = V - PADDING
    case = Case()
    settings = LossSettings(kind, 0.3, 0.1)
    if kind == "mixed":
        settings = LossSettings("jsd", 0.3, 0.1, replaced_kind="reverse_kl", replaced_weight=0.5, clamp=2.0)
    targets = top_k_case(case, 5, vocab)
    token_loss = make_token_loss(settings)
    loss = HeadLoss(
        lambda rows, log_q: token_loss(log_q, targets.select(rows)), 0.2 * case.weights if foreseen else None
    )
    found = chunked_scores(*case.student, tokens_N=case.tokens, chunk=4, vocab=vocab, entropy=True, loss=loss)
    exact, wanted = reference(case, "forward_kl", vocab=vocab)
    hidden, head = exact.student
    wanted = wanted._replace(loss=make_token_loss(settings, vocab=vocab)(hidden @ head.T, targets))
    for name, value in found._asdict().items():
        torch.testing.assert_close(value.double(), getattr(wanted, name), rtol=1e-4, atol=1e-5, msg=name)
    right = exact.gradients(mixed(wanted, case.weights.double(), share))
    for gradient, exact_gradient in zip(case.gradients(mixed(found, case.weights, share)), right, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4)


def test_log_probs_without_a_teacher() -> None:
    case = Case()
    log_prob, entropy, loss = chunked_scores(*case.student, tokens_N=case.tokens, chunk=6, entropy=True)
    assert loss is None
    exact, wanted = reference(case, "forward_kl")
    torch.testing.assert_close(log_prob.double(), wanted.log_prob, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted.entropy, rtol=1e-4, atol=1e-5)
    found = case.gradients((log_prob * case.weights).sum() + entropy.sum())
    right = exact.gradients((wanted.log_prob * case.weights).sum() + wanted.entropy.sum())
    for gradient, exact_gradient in zip(found, right, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4)
    assert chunked_scores(*case.student, tokens_N=case.tokens, chunk=6).entropy is None
