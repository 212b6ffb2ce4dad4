"""The student on a prompt of its own: what it reads of a step, in which blocks, and which of these may be shared."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from skd_plugin.engine.prefix_cache import block_key
from skd_plugin.engine.request import RequestParams
from skd_plugin.engine.student_prompt import StudentPrompts, own_table
from tests.requests import make_request

VLLMS = -1  # a token that is vLLM's


def params(student: list[int], teacher: list[int] | None = None) -> RequestParams:
    return make_request(student, teacher_ids=teacher).params


def test_a_request_carries_both_prompts() -> None:
    request = make_request([4, 5, 6], teacher_ids=[1, 2, 3, 7, 8])
    assert (request.prompt_ids, request.teacher_ids, request.read_ids) == ([4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 7])
    own = request.params
    assert (own.first_token, own.prompt_len, own.student_ids, own.shift) == (8, 3, [4, 5, 6], 2)
    assert RequestParams.from_extra_args(own.to_extra_args()) == own
    same = make_request([4, 5, 6], teacher_ids=[4, 5, 6]).params
    assert (same.student_ids, same.shift) == (None, 0) and same == make_request([4, 5, 6]).params


def test_prompts_that_one_engine_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="the student's prompt has 4 tokens, the teacher's 3: in the engine"):
        make_request([4, 5, 6, 7], teacher_ids=[4, 5, 6])
    with pytest.raises(ValueError, match=r"the prompt has 1 token\(s\)"):
        make_request([4], teacher_ids=[4, 5, 6])


def test_a_batch_without_own_prompts_has_none() -> None:
    assert StudentPrompts.of([params([4, 5]), params([4, 6, 7], [4, 6, 7])]) is None
    assert StudentPrompts.of([params([4, 5]), params([4, 6], [4, 6, 7])]) is not None


@pytest.mark.parametrize("seed", range(20))
def test_the_student_reads_its_sequence_from_beginning_to_end(seed: int) -> None:
    """Prompts in pieces of any size, each step with the token that follows its piece, as vLLM lays them out."""
    draw = random.Random(seed)
    number = draw.randint(1, 4)
    students = [[draw.randint(3, 99) for _ in range(draw.randint(2, 9))] for _ in range(number)]
    teachers = [[*(draw.randint(3, 99) for _ in range(draw.choice([0, 1, 7, 40]))), *ids] for ids in students]
    prompts = StudentPrompts.of([params(*pair) for pair in zip(students, teachers, strict=True)])
    if prompts is None:
        return
    first = [0] * number
    read: list[dict[int, int]] = [{} for _ in range(number)]
    for _ in range(60):
        pieces = [draw.randint(1, 6) for _ in range(number)]
        starts = np.cumsum([0, *(piece + 1 for piece in pieces)])
        positions = np.concatenate([np.arange(f, f + p + 1) for f, p in zip(first, pieces, strict=True)])
        reading = prompts.reading(np.array(first), starts)
        assert reading.starts.tolist() == [0, *np.bincount(reading.row_N, minlength=number).cumsum()]
        assert (np.bincount(reading.row_N, minlength=number) > 0).all()
        for kept, row, token in zip(reading.kept_N, reading.row_N, reading.ids_N, strict=True):
            assert starts[row] <= kept < starts[row + 1]
            own = positions[kept] - prompts.shift_B[row]
            assert reading.has_begun_B[row] == (first[row] + pieces[row] - prompts.shift_B[row] >= 0)
            if own >= 0:
                read[row][own] = token
        first = [f + p for f, p in zip(first, pieces, strict=True)]
    for own, ids, known, last in zip(read, students, prompts.ids, first, strict=True):
        length = last - (prompts.shift_B[read.index(own)]) + 1
        assert list(own) == list(range(length)), "each position in turn, none left out"
        expected = [VLLMS] * length if known is None else [*ids, *[VLLMS] * (length - len(ids))]
        assert list(own.values()) == expected[:length]


def test_blocks_of_the_student() -> None:
    table = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 0, 0]], dtype=torch.int32)
    own = own_table(table, torch.tensor([0, 2, 3]), torch.tensor([True, True, False]))
    assert own[0].tolist() == [3, 4, 5, 6] and own[1, :2].tolist() == [9, 10]
    assert own[2].tolist() == [0, 0, 0, 0], "vLLM's null block, as long as the student's first block may not be there"


@pytest.mark.parametrize("shift", [0, 1, 5, 8, 11, 30])
@pytest.mark.parametrize("block", [4, 8])
def test_a_block_is_known_by_what_the_student_has_in_it(shift: int, block: int) -> None:
    """By the layout itself: the student's i-th token lies (shift // block) blocks behind its own place."""
    student = list(range(20, 33))
    for end in range(block, 80, block):
        inside = [i for i in range(80) if end - block <= i + shift // block * block < end]
        key = block_key(student, shift, end, block)
        if not inside:
            assert key == ()
        elif inside[-1] < len(student):
            assert key == tuple(student)
        else:
            assert key is None
