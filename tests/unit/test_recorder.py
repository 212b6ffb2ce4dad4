"""What a trace says of a token, against float64, whatever the logits are."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from vllm.v1.engine import UtilityOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from skd_plugin.core import logit_rows
from skd_plugin.core import trace as trace_module
from skd_plugin.core.logit_rows import LogitRows
from skd_plugin.core.trace import NOTHING, Trace
from skd_plugin.engine.recorder import Record, Recorder
from skd_plugin.engine.request_table import not_finite

COUNT, VOCAB, TOP_K = 7, 40, 4


def logits(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def record_of(
    teacher: torch.Tensor,
    student: torch.Tensor,
    tau: float = 1.0,
    own: int = 0,
    rows: type[LogitRows] = LogitRows,
) -> Record:
    token = torch.arange(COUNT) * 5
    known = torch.stack([token, torch.zeros_like(token), token, token, token], dim=1).int()
    part = Recorder(TOP_K, own, tau).record(known, token.to(teacher.device), rows.of(teacher), rows.of(student), None)
    return Record.of([(part, 0, COUNT)], TOP_K + own)


def trace_of(*args: Any, **kwargs: Any) -> Trace:
    return record_of(*args, **kwargs).trace()


def expected(teacher: torch.Tensor, student: torch.Tensor, tau: float) -> dict[str, torch.Tensor]:
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    token, rows = torch.arange(COUNT) * 5, torch.arange(COUNT)
    order = p.argsort(descending=True, stable=True)
    rest = [
        sum((p[row, v] / tau).exp().item() for v in range(VOCAB) if v not in (*order[row, :TOP_K], token[row]))
        for row in range(COUNT)
    ]

    firsts = [x.argsort(descending=True, stable=True)[:, :10].tolist() for x in (p, q)]

    def mean(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(weights > 0, weights * values, 0.0).sum(-1)

    return {
        "response_ids": token,
        "student_version": token,
        "student_logp": q[rows, token],
        "teacher_logp": p[rows, token],
        "kl": mean(p.exp(), p - q),
        "student_entropy": -mean(q.exp(), q),
        "teacher_entropy": -mean(p.exp(), p),
        "teacher_rest_tempered": torch.tensor(rest).log(),
        "top_overlap": torch.tensor([len(set(a) & set(b)) / 10 for a, b in zip(*firsts, strict=True)]),
        "same_first": torch.tensor([a[0] == b[0] for a, b in zip(*firsts, strict=True)]),
        "teacher_topk_ids": order[:, :TOP_K],
        "teacher_topk_logp": p.gather(1, order[:, :TOP_K]),
    }


@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("at_once", [3, 1000], ids=["in parts", "at once"])
def test_figures(monkeypatch: pytest.MonkeyPatch, at_once: int, tau: float) -> None:
    monkeypatch.setattr(logit_rows, "ENTRIES_ON_CPU", at_once * VOCAB)
    teacher, student = logits(1), logits(2)
    given = teacher.clone(), student.clone()
    trace = trace_of(teacher, student, tau)
    for name, values in expected(teacher, student, tau).items():
        torch.testing.assert_close(getattr(trace, name).double(), values.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(teacher, given[0]) and torch.equal(student, given[1]), "the models' own logits are left alone"


@pytest.mark.parametrize("own", [1, 3, VOCAB + 5])
def test_entries_of_the_student(own: int) -> None:
    """Behind the teacher's, without those that are named already; the rest is what neither names."""
    teacher, student = logits(1), logits(2)
    trace, p = trace_of(teacher, student, 2.0, own), teacher.double().log_softmax(-1)
    first = student.argsort(descending=True, stable=True)[:, :own].tolist()
    for row, theirs in enumerate(p.argsort(descending=True, stable=True)[:, :TOP_K].tolist()):
        entries = theirs + [v if v not in theirs else NOTHING for v in first[row]]
        assert trace.teacher_topk_ids[row].tolist() == entries
        known = torch.tensor([p[row, v] if v != NOTHING else -torch.inf for v in entries], dtype=torch.float64)
        torch.testing.assert_close(trace.teacher_topk_logp[row].double(), known, atol=1e-5, rtol=1e-5)
        rest = sum((p[row, v] / 2).exp().item() for v in range(VOCAB) if v not in (*entries, row * 5))
        found = trace.teacher_rest_tempered[row].exp().item()
        assert found == pytest.approx(rest, rel=1e-5, abs=1e-9)


def test_tokens_that_a_model_rules_out() -> None:
    """A logit of -inf adds nothing where it is the teacher's, and makes the divergence infinite where p is not 0."""
    teacher, student = logits(1), logits(2)
    teacher[:, 30:], student[:, 35:] = -torch.inf, -torch.inf
    trace, figures = trace_of(teacher, student), expected(teacher, student, 1.0)
    for name in ("kl", "student_entropy", "teacher_entropy", "teacher_rest_tempered"):
        torch.testing.assert_close(getattr(trace, name).double(), figures[name].double(), atol=1e-5, rtol=1e-5)
    assert not_finite([record_of(teacher, student)]) is None
    student[:, 7] = -torch.inf
    assert trace_of(teacher, student).kl.isposinf().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_one_bad_number_is_enough(model: str, bad: float) -> None:
    rows = {"teacher": logits(1), "student": logits(2)}
    assert not_finite([record_of(**rows)]) is None
    rows[model][4, 11] = bad
    assert f"the {model}'s logits are NaN or infinite" in str(not_finite([record_of(**rows)]))


@pytest.mark.parametrize("small", [0, 1 << 16])
def test_a_trace_takes_nothing_along_but_itself(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """Its fields are views of a table, and a response that is cut is one of a longer one's."""
    monkeypatch.setattr(trace_module, "SMALL_BYTES", small)
    trace = trace_of(logits(1), logits(2)).slice(2, 4)
    copied = pickle.loads(pickle.dumps(trace))
    for name, tensor in vars(copied).items():
        torch.testing.assert_close(tensor, getattr(trace, name), rtol=0, atol=0, msg=name)
        assert small or tensor.untyped_storage().nbytes() == tensor.nbytes
    assert copied.response_ids.untyped_storage().nbytes() <= trace.nbytes


@pytest.mark.parametrize("own", [0, 3])
def test_a_response_without_a_token_has_the_columns_of_all(own: int) -> None:
    empty, whole = Record.of([], TOP_K + own).trace(), trace_of(logits(1), logits(2), own=own)
    for name, tensor in vars(empty).items():
        other = getattr(whole, name)
        assert (tensor.dtype, *tensor.shape) == (other.dtype, 0, *other.shape[1:]), name


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # vLLM's, of what it has received
def test_a_record_can_be_sent_by_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one row, too."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    known = torch.arange(5, dtype=torch.int32)[None]
    rows = [LogitRows.of(logits(seed)[:1]) for seed in (1, 2)]
    part = Recorder(TOP_K, 0, 1.0).record(known, known[:, 0].long(), *rows, None)
    record = Record.of([(part, 0, 1)], TOP_K)
    sent = MsgpackEncoder().encode(UtilityOutput(1, result=UtilityResult([[record]])))
    ((found,),) = MsgpackDecoder(UtilityOutput).decode(sent).result.result
    for name, tensor in vars(record.trace()).items():
        torch.testing.assert_close(getattr(found.trace(), name), tensor, rtol=0, atol=0, equal_nan=True, msg=name)
