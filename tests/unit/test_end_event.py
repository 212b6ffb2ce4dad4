"""Tokens that end a turn as one event, against probabilities that are added up by hand in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skd_plugin.core.chunked import HeadLoss, against_teacher, chunked_scores
from skd_plugin.core.end_event import join_ends, join_ends_
from skd_plugin.core.logit_rows import LogitRows
from skd_plugin.core.losses import LOSSES, make_divergence, top_k_loss, whole_vocabulary_loss
from skd_plugin.core.targets import Targets
from skd_plugin.models import joined_ends, joined_ends_words
from tests.conftest import EOS, TEACHERS_END

N, V, H, J = 9, 12, 6, 5
ENDS = torch.tensor([5, 2, 11])
PARAMETERS = {"beta": 0.3, "alpha": 0.1}
DIVERGENCES = [kind for kind, loss in LOSSES.items() if loss.divergence]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added_up(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V - 2] of the joined tokens, by plain sums: all others in their order, then the end."""
    probs_NV = logits_NV.double().softmax(-1)
    others = [token for token in range(V) if token not in ENDS.tolist()]
    return torch.cat([probs_NV[:, others], sum(probs_NV[:, [end]] for end in ENDS.tolist())], 1).log()


def in_that_order(joined_NV: torch.Tensor) -> torch.Tensor:
    others = [token for token in range(V) if token not in ENDS.tolist()]
    return joined_NV[:, [*others, int(ENDS[0])]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_has_the_probability_of_all(dtype: torch.dtype) -> None:
    logits_NV = normal(N, V, seed=0).to(dtype)
    joined_NV = join_ends(logits_NV, ENDS)
    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    found_NV = joined_NV.double().log_softmax(-1)
    torch.testing.assert_close(in_that_order(found_NV), added_up(logits_NV), atol=limit, rtol=0)
    assert (joined_NV.float().softmax(-1)[:, ENDS[1:]] == 0).all()
    assert torch.equal(join_ends(joined_NV, ENDS), joined_NV), "joined ones stay as they are"
    assert torch.equal(join_ends_(logits_NV, ENDS), joined_NV) and torch.equal(logits_NV, joined_NV)


def test_rows_are_read_joined_and_stay_where_they_are() -> None:
    values_SV = normal(N, V, seed=1)
    before = values_SV.clone()
    rows = LogitRows(values_SV, torch.tensor([4, 0, 4]), ENDS).select(torch.tensor([1, 2]))
    torch.testing.assert_close(rows.read(), join_ends(values_SV[[0, 4]], ENDS))
    assert torch.equal(values_SV, before)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_of_the_whole_vocabulary(kind: str, temperature: float) -> None:
    """Values and gradients, in the chunks of an output head, of all that is read of it."""
    hidden_NH, head_VH, theirs_NJ, head_VJ = (
        normal(*s, seed=i) for i, s in enumerate([(N, H), (V, H), (N, J), (V, J)])
    )
    tokens_N = torch.tensor([5, 0, 1, 5, 3, 4, 5, 6, 7])
    divergence = make_divergence(kind, **PARAMETERS)

    def mixed(loss: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return (loss * torch.arange(1, N + 1)).sum() + log_prob.sum() - 0.3 * entropy.sum()

    exact = [x.double().requires_grad_() for x in (hidden_NH, head_VH)]
    log_q, log_p = added_up(exact[0] @ exact[1].T), added_up(theirs_NJ.double() @ head_VJ.double().T)
    softened = [(x / temperature).log_softmax(-1) for x in (log_p, log_q)]
    order = [*(token for token in range(V) if token not in ENDS.tolist()), int(ENDS[0])]
    places = torch.tensor([order.index(token) for token in tokens_N.tolist()])
    wanted = divergence(*softened), log_q[torch.arange(N), places], -(log_q.exp() * log_q).sum(-1)
    wanted_gradients = torch.autograd.grad(mixed(*wanted), exact)

    whole = whole_vocabulary_loss(divergence, temperature)

    def pair_loss(rows: slice, log_p_CV: torch.Tensor, log_q_CV: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(len(log_p_CV))
        targets = Targets(log_p_CV.long(), log_p_CV, nothing, tokens_N[rows], nothing, nothing, nothing, nothing)
        return whole(log_q_CV, targets)

    inputs = [x.clone().requires_grad_() for x in (hidden_NH, head_VH)]
    loss = HeadLoss(against_teacher(theirs_NJ, head_VJ, pair_loss, ENDS))
    scores = chunked_scores(*inputs, tokens_N=tokens_N, chunk=4, ends_E=ENDS, entropy=True, loss=loss)
    found = scores.loss, scores.log_prob, scores.entropy
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)
    for value, expected in zip(torch.autograd.grad(mixed(*found), inputs), wanted_gradients, strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_of_the_teachers_first_tokens(kind: str) -> None:
    """The end is among them, or is the token, or is in the rest: its category is one on both sides."""
    theirs_NV, own_NV = normal(N, V, seed=5), normal(N, V, seed=6).requires_grad_()
    tokens_N = torch.tensor([5, 0, 1, 5, 3, 4, 5, 6, 7])
    divergence = make_divergence(kind, **PARAMETERS)
    log_p_NV = join_ends(theirs_NV, ENDS).log_softmax(-1)
    top, ids = log_p_NV.topk(3, dim=-1)
    rest_N = log_p_NV.exp().scatter(1, ids, 0.0).scatter(1, tokens_N[:, None], 0.0).sum(-1).log()
    token_logp_N = log_p_NV.gather(1, tokens_N[:, None]).squeeze(1)
    nothing = torch.zeros(N)
    targets = Targets(ids, top, rest_N, tokens_N, token_logp_N, nothing, nothing, nothing)
    found_N = top_k_loss(divergence)(join_ends(own_NV, ENDS), targets)
    (gradient,) = torch.autograd.grad(found_N.sum(), own_NV)

    exact_NV = own_NV.detach().double().requires_grad_()
    order = [*(token for token in range(V) if token not in ENDS.tolist()), int(ENDS[0])]
    wanted_N = []
    for row, (log_p, log_q) in enumerate(zip(added_up(theirs_NV), added_up(exact_NV), strict=True)):
        named = [order.index(token) for token in dict.fromkeys([*ids[row].tolist(), int(tokens_N[row])])]
        others = [place for place in range(len(order)) if place not in named]
        parts = [torch.cat([x[named], x[others].logsumexp(0, keepdim=True)]) for x in (log_p, log_q)]
        wanted_N.append(divergence(*parts))
    (wanted_gradient,) = torch.autograd.grad(sum(wanted_N), exact_NV)
    torch.testing.assert_close(found_N.double(), torch.stack(wanted_N), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=1e-5, rtol=1e-4)


def test_the_gradient_goes_to_each_end_by_its_share() -> None:
    logits_V = torch.zeros(V)
    logits_V[ENDS] = torch.tensor([0.1, 0.6, 0.3]).log()
    logits_V.requires_grad_()
    join_ends(logits_V, ENDS)[ENDS[0]].backward()
    torch.testing.assert_close(logits_V.grad[ENDS], torch.tensor([0.1, 0.6, 0.3]))


# --- which tokens ---


def ends_of(folder: Path) -> tuple[int, ...]:
    return joined_ends(str(folder / "teacher"), str(folder / "student"))


def write_ends(folder: Path, role: str, *, token: str | None, listed: list[int] | None) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder / role)
    tokenizer.eos_token = token
    tokenizer.save_pretrained(folder / role)
    if listed is None:
        (folder / role / "generation_config.json").unlink()
    else:
        GenerationConfig(eos_token_id=listed).save_pretrained(folder / role)


@pytest.fixture
def pair(tiny_pair: Path, tmp_path: Path) -> Path:
    for role in ("teacher", "student"):
        (tmp_path / role).mkdir()
        for file in (tiny_pair / role).glob("*.json"):
            (tmp_path / role / file.name).write_text(file.read_text())
    return tmp_path


def test_two_models_that_end_in_two_ways(two_ends: Path) -> None:
    from transformers import AutoTokenizer

    assert ends_of(two_ends) == (EOS, TEACHERS_END)
    assert joined_ends(str(two_ends / "student"), str(two_ends / "teacher")) == (TEACHERS_END, EOS)
    words = joined_ends_words(AutoTokenizer.from_pretrained(two_ends / "student"), (EOS, TEACHERS_END))
    assert words is not None and words.startswith("</s> (2) and e (7) end a turn") and words.endswith("</s> (2)")


def test_models_that_end_alike(pair: Path) -> None:
    assert ends_of(pair) == ()
    assert joined_ends_words(None, ()) is None
    for role in ("teacher", "student"):
        write_ends(pair, role, token="</s>", listed=[2, 9])
    assert ends_of(pair) == (), "several tokens of which both models know are no two ways to end"
    for role in ("teacher", "student"):
        write_ends(pair, role, token=None, listed=[])
    assert ends_of(pair) == ()


@pytest.mark.parametrize(
    ("teacher", "student", "joined"),
    [
        ({"token": "e", "listed": [7, 2, 9]}, {"token": "</s>", "listed": [2]}, (2, 7, 9)),
        ({"token": "</s>", "listed": [2, 9]}, {"token": "</s>", "listed": [2]}, (2, 9)),
        # What the student's file lists once it has been trained.
        ({"token": "e", "listed": [2, 7]}, {"token": "</s>", "listed": [2, 7]}, (2, 7)),
        ({"token": "e", "listed": None}, {"token": "</s>", "listed": None}, (2, 7)),
        ({"token": "e", "listed": [7]}, {"token": None, "listed": [2]}, (7, 2)),
        ({"token": "e", "listed": [7, 500]}, {"token": "e", "listed": [7]}, ()),
    ],
    ids=["several", "one more", "a trained student", "no lists", "a tokenizer without one", "no token of both"],
)
def test_which_tokens_are_joined(pair: Path, teacher: dict, student: dict, joined: tuple[int, ...]) -> None:
    """The first is the student's tokenizer's, or else the teacher's: an engine of the two stops there anyway."""
    write_ends(pair, "teacher", **teacher)
    write_ends(pair, "student", **student)
    assert ends_of(pair) == joined


@pytest.mark.parametrize(("choice", "joined"), [("auto", True), ("apart", False)])
def test_a_reference_model_is_joined_as_the_policy_is(
    two_ends: Path, monkeypatch: pytest.MonkeyPatch, choice: str, joined: bool
) -> None:
    """OpenRLHF's frozen model, to which its policy is held by their log-probabilities of the same tokens."""
    from skd_plugin.host import on_cpu

    on_cpu.install()
    import ray
    from transformers import AutoModelForCausalLM

    from skd_plugin.config.schema import SKDConfig
    from skd_plugin.host import bind

    student = str(two_ends / "student")

    class Host:
        def init_model_from_pretrained(self, strategy: object, path: str) -> None:
            self.model = SimpleNamespace(model=AutoModelForCausalLM.from_pretrained(path))

    for module, name in ((bind.trust, "close_transformers"), (bind.on_cpu, "adapt_trainer")):  # of the whole process
        monkeypatch.setattr(module, name, lambda: None)
    skd = SKDConfig(teacher={"model_name_or_path": str(two_ends / "teacher")}, end_tokens=choice)
    args = SimpleNamespace(skd=skd, actor=SimpleNamespace(model_name_or_path=student))
    reference = bind._frozen(ray.remote(Host), has_logits=True)()
    reference.init_model_from_pretrained(SimpleNamespace(args=args), student)
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        found = reference.model.model(ids).logits
        apart = AutoModelForCausalLM.from_pretrained(student)(ids).logits
    wanted = join_ends(apart, torch.tensor([EOS, TEACHERS_END])) if joined else apart
    torch.testing.assert_close(found, wanted)
