"""Traces for tests that read only a part of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from skd_plugin.core.trace import NOTHING, Trace

DTYPES = {"source": torch.uint8} | dict.fromkeys(
    ("response_ids", "rejected_ids", "draft_rank", "teacher_topk_ids", "student_version"), torch.int32
)


def trace_of(response_ids: torch.Tensor, **known: Any) -> Trace:
    """A trace of these tokens, all kept, with what is `known`; everything else is zero and empty of meaning."""
    count = len(response_ids)
    shapes = dict.fromkeys(("teacher_topk_ids", "teacher_topk_logp"), (count, 1))
    names = [field.name for field in fields(Trace) if field.name != "teacher_hidden"]
    blank = {name: torch.zeros(shapes.get(name, count), dtype=DTYPES.get(name, torch.float32)) for name in names}
    blank["rejected_ids"].fill_(NOTHING)
    return Trace(**{**blank, "response_ids": response_ids.to(torch.int32), **known})


def same_trace(one: Trace, other: Trace) -> None:
    for field in fields(Trace):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "teacher_topk_ids" or not mine.is_floating_point():
            assert torch.equal(mine, theirs), field.name
        else:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, equal_nan=False, msg=field.name)
