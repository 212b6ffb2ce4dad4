"""A line of traces.jsonl as the page needs it: columns of one length, of clean values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.report.values import LAST_ID, LAST_STEP, clean, drawable, is_whole
from skd_plugin.run_folder import LeftOut, Record

Kind = TypeVar("Kind", str, list)

TOP = 5  # entries of the teacher's distribution that a page shows
SOURCES = {source.letter: source for source in Source}
Numbers = list[float | None]  # None: the value does not exist


@dataclass(frozen=True)
class Response:
    """One response of R tokens. Log-probabilities, KL and entropy in nats."""

    step: int
    cut_off: bool
    prompt: str
    teacher_prompt: str  # empty where it reads the student's
    teacher_name: str  # of several; else empty
    text: str
    ids: list[int]  # R of each column
    sources: list[Source]
    rejected: list[int]  # NOTHING where no token was
    draft_rank: list[int]  # NOTHING where none was proposed
    student_logp: Numbers
    teacher_logp: Numbers
    kl: Numbers
    student_entropy: Numbers
    top_ids: list[list[int]]  # at most TOP in a row
    top_logp: list[Numbers]


class _Wrong(Exception):
    """A field is not what it must be: what it is instead."""


def read_response(record: Record, line: int, left_out: LeftOut) -> Response | None:
    """None, and what is wrong to `left_out`, where a token could not be shown as it was.

    A prompt or a response that is no text is left out alone, and so is a number that is too large: the tokens are
    whole without it.
    """
    try:
        return _read(record, line, left_out)
    except _Wrong as fault:
        left_out.add("response", str(fault), line)
        return None


def _read(record: Record, line: int, left_out: LeftOut) -> Response:
    step = record.get("step", 0)  # those of `skd rollout` have none
    if not is_whole(step, 0, LAST_STEP):
        raise _Wrong(f"step is no whole number from 0 to {LAST_STEP:,}")
    ids = _ids(record, "response_ids", 0)
    size = len(ids)
    source = _field(record, "source", str, size)
    if unknown := set(source) - SOURCES.keys():
        raise _Wrong(f"source has unknown letters such as {min(unknown)!r}")
    top_ids, top_logp = _top(record, size)
    columns = {
        name: _numbers(_field(record, name, list, size), name)
        for name in ("student_logp", "teacher_logp", "kl", "student_entropy")
    }
    rejected, draft_rank = (_ids(record, name, NOTHING, size) for name in ("rejected_ids", "draft_rank"))
    if any(_is_lost(value) for name in columns for value in record[name]):
        left_out.add("number", "infinite, NaN or too large to be shown; its token is here", line)
    return Response(
        step=step,
        cut_off=record.get("finish") == "length",
        prompt=_text(record, "prompt", line, left_out),
        teacher_prompt=_text(record, "teacher_prompt", line, left_out) if "teacher_prompt" in record else "",
        teacher_name=_text(record, "teacher", line, left_out) if "teacher" in record else "",
        text=_text(record, "response", line, left_out),
        ids=ids,
        sources=[SOURCES[letter] for letter in source],
        rejected=rejected,
        draft_rank=draft_rank,
        top_ids=top_ids,
        top_logp=top_logp,
        **columns,
    )


def _field(record: Record, name: str, kind: type[Kind], size: int | None) -> Kind:
    if name not in record:
        raise _Wrong(f"{name} is missing")
    value = record[name]
    if not isinstance(value, kind):
        raise _Wrong(f"{name} is no {'text' if kind is str else 'list'}")
    if size is not None and len(value) != size:
        raise _Wrong(f"{name} is not as long as response_ids")
    return value


def _ids(record: Record, name: str, least: int, size: int | None = None) -> list[int]:
    return _whole_numbers(_field(record, name, list, size), name, least)


def _whole_numbers(values: list, name: str, least: int) -> list[int]:
    if not all(is_whole(value, least, LAST_ID) for value in values):
        raise _Wrong(f"{name} holds something that is no whole number from {least} to {LAST_ID:,}")
    return values


def _numbers(values: list, name: str) -> Numbers:
    """What is infinite, NaN or too large does not exist."""
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        raise _Wrong(f"{name} holds something that is neither a number nor null")
    return [drawable(value) for value in values]


def _top(record: Record, size: int) -> tuple[list[list[int]], list[Numbers]]:
    names = "teacher_topk_ids", "teacher_topk_logp"
    ids, logps = (_field(record, name, list, size) for name in names)
    for name, rows in zip(names, (ids, logps), strict=True):
        if not all(isinstance(row, list) for row in rows):
            raise _Wrong(f"{name} holds something that is no list")
    if any(len(row) != len(logp) for row, logp in zip(ids, logps, strict=True)):
        raise _Wrong("teacher_topk_ids and teacher_topk_logp differ in length")
    top_ids = [_whole_numbers(row[:TOP], names[0], 0) for row in ids]
    return top_ids, [_numbers(row[:TOP], names[1]) for row in logps]


def _is_lost(value: float | None) -> bool:
    return value is not None and drawable(value) is None


def _text(record: Record, name: str, line: int, left_out: LeftOut) -> str:
    value = record.get(name, "")
    if isinstance(value, str):
        return clean(value)
    left_out.add(name, "it is no text; its tokens are here", line)
    return ""
