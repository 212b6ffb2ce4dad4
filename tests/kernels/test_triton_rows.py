"""The kernels against float64, and against what torch's operators find."""

from __future__ import annotations

import pytest
import torch
from bench_sampler import Counted
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.core import logit_rows
from skd_plugin.core.logit_rows import LogitRows, Seen, Wanted, rank
from skd_plugin.core.sampling import SamplingSettings, SettingRows
from skd_plugin.engine import kernels
from skd_plugin.engine.kernels import rows_of
from skd_plugin.engine.request_table import not_finite
from skd_plugin.engine.triton_rows import TritonRows
from tests.unit import test_recorder as recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits(count: int, vocab_size: int, seed: int) -> torch.Tensor:
    return (torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4).to(DEVICE)


def look(
    kind: type[LogitRows],
    teacher: torch.Tensor,
    student: torch.Tensor,
    wanted: Wanted,
    ends: list[int] | None = None,
) -> Seen:
    """At rows that are not in the order of the tensor, of which one comes twice."""
    rows = torch.tensor([3, 0, 2, 2], device=DEVICE)
    ends_E = None if ends is None else torch.tensor(ends, device=DEVICE)
    token_N = torch.tensor([0, 5, teacher.shape[1] - 1, 7], device=DEVICE)
    return kind(teacher, rows, ends_E).look(kind(student, rows.flip(0)), token_N, wanted)


def assert_same(one: Seen, other: Seen) -> None:
    for name, a, b in zip(Seen._fields, one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("own", [0, 3])
@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
def test_against_float64(tau: float, own: int) -> None:
    """What a trace says, whoever reads the logits."""
    teacher, student = recorded.logits(1), recorded.logits(2)
    trace, figures = (
        recorded.trace_of(teacher.to(DEVICE), student.to(DEVICE), tau, own, TritonRows),
        recorded.expected(teacher, student, tau),
    )
    for name, values in figures.items():
        found = getattr(trace, name).double()
        if own and name.startswith("teacher_topk"):
            found = found[:, : recorded.TOP_K]
        if not own or name != "teacher_rest_tempered":
            torch.testing.assert_close(found, values.double(), atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "vocab_size, top, own, tau, ends",
    [
        (12, 64, 20, 0.5, None),  # all of it is at the top
        (200, 64, 0, 1.0, [7, 3]),
        (5003, 64, 0, 1.0, None),  # a prime: the last piece is cut
        (5003, 20, 30, 2.0, [5, 77, 4000]),
        (4096, 1, 1, 1.0, [0]),
        (9001, 700, 0, 1.0, [9000, 1]),
    ],
)
def test_as_torch(vocab_size: int, top: int, own: int, tau: float, ends: list[int] | None) -> None:
    teacher, student = logits(4, vocab_size, 0), logits(4, vocab_size, 1)
    wanted = Wanted(max(top, 10), max(own, 10), top, own, tau)
    assert_same(*(look(kind, teacher, student, wanted, ends) for kind in (LogitRows, TritonRows)))


@pytest.mark.parametrize("noise", [0.01, 0.3, 8.0])
def test_a_long_row_against_float64(noise: float) -> None:
    """As exact as float32 is, models that are alike among them; torch's own operators are not, in so long a row."""
    teacher = logits(4, 151936, 0)
    student = teacher + logits(4, 151936, 1) * noise
    token_N = torch.tensor([0, 5, 151935, 7], device=DEVICE)
    seen = TritonRows.of(teacher).look(TritonRows.of(student), token_N, Wanted(64, 10, 64, 0, 1.0))
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    order = p.argsort(-1, descending=True)
    assert torch.equal(seen.teacher_ids_NK, order[:, :64])
    left = p.exp().scatter(1, order[:, :64], 0).scatter(1, token_N[:, None], 0)
    expected = {
        "kl_N1": (p.exp() * (p - q)).sum(-1, keepdim=True),
        "teacher_entropy_N1": -(p.exp() * p).sum(-1, keepdim=True),
        "student_entropy_N1": -(q.exp() * q).sum(-1, keepdim=True),
        "student_logp_N1": q.gather(1, token_N[:, None]),
        "rest_N1": left.sum(-1, keepdim=True).log(),
        "teacher_top_NK": p.gather(1, order[:, :64]),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(seen, name).double(), values, atol=1e-6, rtol=2e-6, msg=name)


def test_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as there is memory for their pieces."""
    teacher, student, wanted = logits(4, 3000, 0), logits(4, 3000, 1), Wanted(20, 10, 20, 3, 1.0)
    whole = look(TritonRows, teacher, student, wanted)
    for name in ("ENTRIES_ON_CPU", "ENTRIES_ON_GPU"):
        monkeypatch.setattr(logit_rows, name, 1000)
    for one, other in zip(whole, look(TritonRows, teacher, student, wanted), strict=True):
        assert torch.equal(one, other)


def test_the_student_may_have_joined_ends_too() -> None:
    teacher, student, ends = logits(3, 300, 0), logits(3, 300, 1), torch.tensor([8, 250], device=DEVICE)
    rows, token_N = torch.arange(3, device=DEVICE), torch.tensor([8, 250, 4], device=DEVICE)
    seen = [
        kind(teacher, rows, ends).look(kind(student, rows, ends), token_N, Wanted(10, 10, 5, 2, 1.0))
        for kind in (LogitRows, TritonRows)
    ]
    assert_same(*seen)


def test_a_model_that_is_another_s_copy_has_no_divergence() -> None:
    """Nothing of the sums that cancel is left."""
    same = logits(4, 3000, 0) * 5
    rows = torch.arange(4, device=DEVICE)
    seen = TritonRows(same, rows).look(TritonRows(same.clone(), rows), rows, Wanted(10, 10, 10, 0, 1.0))
    assert seen.kl_N1.abs().max() < 1e-5
    assert torch.equal(seen.student_entropy_N1, seen.teacher_entropy_N1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    teacher, student = logits(4, 900, 0).to(dtype), logits(4, 900, 1).to(dtype)
    wanted = Wanted(10, 10, 0, 0, 1.0)  # among equals either may come first, so that nothing is named
    one, other = (look(kind, teacher, student, wanted) for kind in (LogitRows, TritonRows))
    for name in ("kl_N1", "student_entropy_N1", "teacher_entropy_N1", "rest_N1", "teacher_top_NK"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)


def test_tokens_that_a_model_rules_out() -> None:
    teacher, student = logits(4, 5000, 1), logits(4, 5000, 2)
    teacher[:, 100:3000], student[:, 150:2900], teacher[:, 4999] = -torch.inf, -torch.inf, -torch.inf
    wanted = Wanted(64, 10, 64, 0, 1.0)
    assert_same(*(look(kind, teacher, student, wanted) for kind in (LogitRows, TritonRows)))
    student[:, 7] = -torch.inf
    assert look(TritonRows, teacher, student, wanted).kl_N1.isposinf().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_one_bad_number_is_enough(model: str, bad: float) -> None:
    rows = {"teacher": recorded.logits(1).to(DEVICE), "student": recorded.logits(2).to(DEVICE)}
    assert not_finite([recorded.record_of(**rows, rows=TritonRows)]) is None
    rows[model][4, 11] = bad
    assert f"the {model}'s logits are NaN or infinite" in str(
        not_finite([recorded.record_of(**rows, rows=TritonRows)])
    )


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_rank_of_equals(values: list[int]) -> None:
    """Small integers make many ties; each token's rank is as torch says."""
    row = torch.tensor(values, device=DEVICE).float()
    tokens = torch.arange(len(values), device=DEVICE)
    rows = TritonRows(row.expand(2, -1).contiguous(), torch.zeros_like(tokens))
    assert torch.equal(rows.rank(tokens), rank(row.expand(len(values), -1).contiguous(), tokens))


def test_rank_in_a_long_row_and_of_joined_ends() -> None:
    values, tokens = logits(3, 5003, 0), torch.tensor([9, 5002, 41], device=DEVICE)
    for ends in (None, torch.tensor([41, 5002], device=DEVICE)):
        ranks = [kind(values, torch.arange(3, device=DEVICE), ends).rank(tokens) for kind in (LogitRows, TritonRows)]
        assert torch.equal(*ranks)
    assert TritonRows(values, tokens[:0]).rank(tokens[:0]).tolist() == []


def test_they_are_compared_with_torch_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(64, 10, 64, 0, 1.0)
    assert rows_of("triton", DEVICE, torch.bfloat16, 3000, wanted) is TritonRows
    assert rows_of("auto", torch.device("cpu"), torch.float32, 3000, wanted) is LogitRows
    assert rows_of("torch", torch.device("cuda"), torch.float32, 3000, wanted) is LogitRows

    for by in (0.01, torch.nan):

        def wrong(self: TritonRows, student: LogitRows, token_N: torch.Tensor, wanted: Wanted, by: float = by) -> Seen:
            seen = LogitRows.look(self, student, token_N, wanted)
            return seen._replace(kl_N1=seen.kl_N1 + by)

        with monkeypatch.context() as patched:
            patched.setattr(TritonRows, "look", wrong)
            with pytest.raises(RuntimeError, match=rf"differ by {by} in kl_N1, of at most 0.001.*kernels: torch"):
                rows_of("triton", DEVICE, torch.float32, 3000, wanted)
    with monkeypatch.context() as patched:
        patched.setattr(TritonRows, "rank", lambda self, token_N: token_N * 0)
        with pytest.raises(RuntimeError, match="in rank"):
            rows_of("triton", DEVICE, torch.float32, 3000, wanted)
    for wrong_draw in (
        lambda self, settings, model, uniform_N: LogitRows.sample(self, settings, model, 1 - uniform_N),
        lambda self, settings, model, uniform_N: LogitRows.sample(
            self, SettingRows.of([SamplingSettings(0)] * 4, DEVICE), model, uniform_N
        ),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(TritonRows, "sample", wrong_draw)
            with pytest.raises(RuntimeError, match="in sample"):
                rows_of("triton", DEVICE, torch.float32, 3000, wanted)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed"):
        rows_of("triton", DEVICE, torch.float32, 3000, wanted)
    assert rows_of("auto", torch.device("cuda"), torch.float32, 3000, wanted) is LogitRows


@pytest.mark.parametrize("ends", [None, [5, 77]])
def test_nothing_waits_for_the_device(ends: list[int] | None) -> None:
    teacher, student = logits(4, 900, 0), logits(4, 900, 1)
    rows, token_N = torch.arange(4, device=DEVICE), torch.tensor([1, 5, 77, 899], device=DEVICE)
    ends_E = None if ends is None else torch.tensor(ends, device=DEVICE)
    ours = TritonRows(teacher, rows, ends_E)
    warped = SettingRows.of([SamplingSettings(1, student_temperature=0.7, student_top_p=0.9)] * 4, DEVICE)
    with Counted() as seen:
        ours.look(TritonRows(student, rows), token_N, Wanted(64, 10, 64, 3, 2.0))
        ours.rank(token_N)
        ours.sample(warped, "student", token_N.double() / 900)
        ours.warp(warped, "teacher")
    assert not seen.waits, seen.waits
    with Counted() as seen:
        bool(token_N[0] > 0)
    assert seen.waits == {"_local_scalar_dense": 1}
