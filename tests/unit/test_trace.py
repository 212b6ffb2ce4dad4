"""The record of a response: slices, joins, and its documented JSON form."""

import json
import pickle
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch

from skd_plugin.core.trace import Source, Trace
from skd_plugin.run_folder import json_line
from tests.traces import trace_of

KEYS = {
    "prompt_ids", "response_ids", "source", "rejected_ids", "draft_rank", "student_logp", "teacher_logp", "kl",
    "student_entropy", "teacher_entropy", "top_overlap", "same_first", "teacher_topk_ids", "teacher_topk_logp",
    "teacher_rest_tempered", "finish",
}  # fmt: skip


@pytest.fixture
def trace() -> Trace:
    """A kept, a replaced and an undrafted token."""
    nan = float("nan")
    return Trace(
        response_ids=torch.tensor([5, 6, 7], dtype=torch.int32),
        source=torch.tensor([Source.ACCEPTED, Source.REPLACED, Source.UNDRAFTED], dtype=torch.uint8),
        rejected_ids=torch.tensor([-1, 9, -1], dtype=torch.int32),
        draft_rank=torch.tensor([0, 12, -1], dtype=torch.int32),
        student_logp=torch.tensor([-0.5, -1.5, nan]),
        teacher_logp=torch.tensor([-0.25, -0.75, -float("inf")]),
        kl=torch.tensor([0.5, 0.25, nan]),
        student_entropy=torch.tensor([1.0, 2.0, nan]),
        teacher_entropy=torch.tensor([0.5, 1.5, 0.25]),
        top_overlap=torch.tensor([1.0, 0.5, nan]),
        same_first=torch.tensor([1.0, 0.0, nan]),
        teacher_topk_ids=torch.tensor([[5, 1], [6, 2], [7, 3]], dtype=torch.int32),
        teacher_topk_logp=torch.tensor([[-0.25, -2.0], [-0.75, -2.5], [-1.0, -float("inf")]]),
        teacher_rest_tempered=torch.tensor([-1.5, -0.5, -float("inf")]),
    )


def assert_equal(left: Trace, right: Trace) -> None:
    for field in fields(Trace):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert a.dtype == b.dtype, field.name
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=field.name)


@pytest.mark.parametrize("hidden", [0, 3, 40_000])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_a_copy_in_another_process_is_the_same(trace, hidden, kind):
    """Whether its memory may be written to there or not; large tensors go by themselves."""
    trace = replace(trace, teacher_hidden=torch.randn(3, hidden).to(kind) if hidden else torch.empty(3, 0))
    for whole in (trace, trace.slice(1, 2), trace.slice(0, 0), trace.drawn):
        buffers: list[pickle.PickleBuffer] = []
        sent = pickle.dumps(whole, protocol=5, buffer_callback=buffers.append)
        frozen = [bytes(buffer.raw()) for buffer in buffers]
        for copied in (pickle.loads(sent, buffers=frozen), pickle.loads(pickle.dumps(whole)), deepcopy(whole)):
            assert type(copied) is type(whole)
            for name, tensor in vars(whole).items():
                found = getattr(copied, name)
                assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
                torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True, msg=name)
                found.add_(1)  # without a word of PyTorch's
    assert torch.equal(trace.response_ids, torch.tensor([5, 6, 7], dtype=torch.int32))


def test_json_has_the_documented_keys_and_values(trace):
    line = json.loads(json_line(trace.to_json([1, 2], "stop")))
    assert set(line) == KEYS
    assert line["prompt_ids"] == [1, 2] and line["response_ids"] == [5, 6, 7] and line["finish"] == "stop"
    assert line["source"] == "stu"
    assert line["rejected_ids"] == [-1, 9, -1] and line["draft_rank"] == [0, 12, -1]
    assert line["teacher_topk_ids"] == [[5, 1], [6, 2], [7, 3]]
    assert line["teacher_entropy"] == [0.5, 1.5, 0.25]
    assert line["teacher_rest_tempered"] == [-1.5, -0.5, None]


def test_json_is_strict(trace):
    """NaN and infinity are not JSON: they become null."""
    line = json.loads(json_line(trace.to_json([1, 2], "length")), parse_constant=pytest.fail)
    assert line["student_logp"] == [-0.5, -1.5, None]
    assert line["teacher_logp"] == [-0.25, -0.75, None]
    assert line["kl"][2] is None and line["student_entropy"][2] is None
    assert line["teacher_topk_logp"][2] == [-1.0, None]


def test_json_has_the_numbers_and_no_more_digits_than_they_have(trace):
    trace.kl = torch.tensor([0.1, 1 / 3, 1e-20])
    written = json_line(trace.to_json([1, 2], "stop"))
    assert b'"kl":[0.1,0.33333334,1e-20]' in written
    assert torch.equal(torch.tensor(json.loads(written)["kl"]), trace.kl)


def test_json_names_no_entry_that_is_none(trace):
    """The student's first tokens that are among the teacher's."""
    trace.teacher_topk_ids = torch.tensor([[5, 1, -1], [6, 2, 4], [7, 3, -1]], dtype=torch.int32)
    trace.teacher_topk_logp = torch.tensor([[-0.5, -2.0, -float("inf")], [-0.5, -2.5, -3.0], [-1.0] * 3])
    line = json.loads(json_line(trace.to_json([1, 2], "stop")))
    assert line["teacher_topk_ids"] == [[5, 1], [6, 2, 4], [7, 3]]
    assert line["teacher_topk_logp"] == [[-0.5, -2.0], [-0.5, -2.5, -3.0], [-1.0, -1.0]]


def test_letters_follow_the_codes():
    """A trace file is read by people and by the report: a letter never changes its meaning."""
    letters = {"s": Source.ACCEPTED, "t": Source.REPLACED, "u": Source.UNDRAFTED}
    letters |= {"r": Source.REFERENCE, "a": Source.RESAMPLED, "f": Source.FLAGGED, "h": Source.HANDED}
    assert {source.letter: source for source in Source} == letters
    assert [source.letter for source in sorted(Source)] == list("sturafh")


def test_slices_join_to_the_whole(trace):
    assert_equal(Trace.join([trace.slice(0, 1), trace.slice(1, 1), trace.slice(1, 3)]), trace)
    assert len(trace.slice(0, 2)) == 2


def test_empty_joins_without_a_change(trace):
    empty = Trace.empty(2)
    assert len(empty) == 0 and empty.teacher_topk_ids.shape == (0, 2)
    assert_equal(Trace.join([empty, trace]), trace)
    assert empty.to_json([1, 2], "stop")["source"] == ""


def test_hidden_states_are_kept_beside_parts_without_a_token(trace):
    """An empty part does not know the teacher's width."""
    assert trace.teacher_hidden.shape == (3, 0)
    trace.teacher_hidden = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    joined = Trace.join([Trace.empty(2), trace.slice(0, 2), trace.slice(2, 2), Trace.empty(2), trace.slice(2, 3)])
    assert_equal(joined, trace)
    assert set(trace.to_json([1, 2], "stop")) == KEYS


def test_tokens_are_found_by_their_sources():
    """The student's own: drawn from its whole distribution and left in the text; an answer inside the gate is not."""
    every = trace_of(torch.arange(len(Source)), source=torch.tensor(list(Source), dtype=torch.uint8))
    assert [Source(code) for code in every.source[every.students_own].tolist()] == [Source.ACCEPTED, Source.FLAGGED]
    assert every.is_from(Source.REPLACED, Source.RESAMPLED).tolist() == [False, True, False, False, True, False, False]
    assert not every.is_from().any() and every.is_from().shape == (len(Source),)
