"""Signs of a run that fails as such runs do: said once, with the remedy, while it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

STEPS = 5  # of which a mean is taken, at the start and now

# Metrics that an alarm looks at.
HEARD = ("skd/truncated_frac", "skd/response_len", "skd/student_entropy", "skd/teacher_entropy", "skd/horizon")

Means = Mapping[str, float]  # metric -> mean of some steps; one that had no value is missing
Alarm = Callable[[Means, Means], str | None]  # (at the start, now) -> what is wrong, or nothing


def truncated(start: Means, now: Means) -> str | None:
    share, first = now.get("skd/truncated_frac", 0.0), start.get("skd/truncated_frac", 0.0)
    if _is_cut(start, now) or not share > max(0.5, first + 0.25):
        return None
    return (
        f"{share:.0%} of the responses reach the length limit ({first:.0%} at first): the student no longer ends its "
        "answers. Look at some (skd report) and at its end token (skd check). Usual remedies: "
        "skd.loss.kind=forward_kl, references first (skd.rollout.method=two_stage), a lower openrlhf.actor.adam.lr; "
        "if the answers are right, a higher skd.rollout.max_new_tokens"
    )


def longer(start: Means, now: Means) -> str | None:
    length, first = now.get("skd/response_len", 0.0), start.get("skd/response_len", 0.0)
    if _is_cut(start, now) or not first or not length > 2 * first:
        return None
    return (
        f"responses have grown from {first:.0f} to {length:.0f} tokens. If the answers are no better for it (eval/*), "
        "the student repeats itself: stop, and start again from an earlier checkpoint with a lower "
        "skd.rollout.max_new_tokens or a smaller openrlhf.actor.adam.lr"
    )


def collapsed(start: Means, now: Means) -> str | None:
    student, teacher = now.get("skd/student_entropy"), now.get("skd/teacher_entropy")
    first = start.get("skd/student_entropy")
    if student is None or teacher is None or first is None or not student < min(teacher / 4, first / 2):
        return None
    return (
        f"the student's entropy has fallen from {first:.2g} to {student:.2g} nats a token, far below the teacher's "
        f"{teacher:.2g}: it says one thing where the teacher knows several. Usual remedies: skd.loss.kind=forward_kl, "
        "or that kind in skd.loss.regions where the teacher is flat; skd.rollout.student_temperature=1"
    )


def _is_cut(start: Means, now: Means) -> bool:
    """A horizon that has moved moves lengths and cuts, as it should."""
    return now.get("skd/horizon") != start.get("skd/horizon")


ALARMS: tuple[Alarm, ...] = (truncated, longer, collapsed)


class Alarms:
    """Hears the step records of a run in their order."""

    def __init__(self) -> None:
        self._first: list[Mapping[str, Any]] = []
        self._last: deque[Mapping[str, Any]] = deque(maxlen=STEPS)
        self._silent = set(ALARMS)  # those that have not sounded yet

    def hear(self, record: Mapping[str, Any]) -> list[str]:
        """Sentences to be said after this step; each alarm sounds once in a run."""
        if len(self._first) < STEPS:
            self._first.append(record)
            return []
        self._last.append(record)
        if len(self._last) < STEPS:
            return []
        start, now = _means(self._first), _means(self._last)
        said = []
        for alarm in ALARMS:
            if alarm in self._silent and (words := alarm(start, now)):
                self._silent.remove(alarm)
                said.append(f"Attention: over the last {STEPS} steps, {words}.")
        return said


def _means(records: list[Mapping[str, Any]] | deque[Mapping[str, Any]]) -> Means:
    means = {}
    for name in HEARD:
        known = [record[name] for record in records if isinstance(record.get(name), int | float)]
        if known:
            means[name] = sum(known) / len(known)
    return means
