"""Traces between the engine's actor, which makes them, and the policy actor, which trains on them.

A trace is large: some 550 bytes a token, and 8 KB more with the teacher's hidden states. The engine's actor puts it
into Ray's object store, and a policy actor fetches it from there. What goes through the controller is a reference
with the little that the controller needs. Ray keeps a trace until the last reference to it is gone. A small trace goes
along with its response, written once and read once: to store it and to fetch it would take longer than the rest of its
way.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectLostError

from skd_plugin.core.metrics import Figures, Ratio, figures_of
from skd_plugin.core.trace import Drawn, Trace

TRACE_KEY = "skd"  # of a response, and of Experience.info
CARRIED_BYTES = 1 << 16  # of a trace that goes along; Ray sends some 100 KB with an answer, and stores what is more
PROMPT_WEIGHT = "skd_prompt_weight"  # of Experience.info: a number a response, where prompts are weighed


class Versions(NamedTuple):
    """Of the student that proposed the tokens: updates that it had had."""

    mean: Ratio  # over the tokens
    least: int

    @classmethod
    def of(cls, trace: Trace) -> Versions:
        version = trace.student_version.numpy()
        return cls(Ratio.mean(version), int(version.min()) if len(trace) else 0)


@dataclass(frozen=True)
class StoredTrace:
    """A trace in the object store, or a small one as pickle writes it, and what of it the controller looks at."""

    held: ray.ObjectRef | bytes
    drawn: Drawn  # of the same tokens
    figures: Figures
    versions: Versions

    def __len__(self) -> int:
        return len(self.drawn)

    @classmethod
    def put(cls, trace: Trace, draft_len: int | None) -> StoredTrace:
        """In the process that made it, which from now on owns it.

        Args:
            draft_len: tokens of a block, which the figures need; None: blocks differ.
        """
        held = pickle.dumps(trace, pickle.HIGHEST_PROTOCOL) if trace.nbytes <= CARRIED_BYTES else ray.put(trace)
        return cls(held, trace.drawn, figures_of(trace, draft_len), Versions.of(trace))


def fetch(held: Sequence[ray.ObjectRef | bytes]) -> list[Trace]:
    """The traces themselves. Their tensors may be views of the object store, which are not to be written to.

    Args:
        held: of `StoredTrace`.

    Raises:
        RuntimeError: one of them is lost.
    """
    refs = [one for one in held if not isinstance(one, bytes)]
    try:
        fetched = iter(ray.get(refs) if refs else [])
    except ObjectLostError as error:
        raise RuntimeError(
            f"a trace is lost: the engine's actor that sampled the response has died, and what it had put into Ray's "
            f"object store is gone with it ({type(error).__name__}). Nothing was updated by this step; host.log says "
            "why the engine died"
        ) from error
    return [pickle.loads(one) if isinstance(one, bytes) else next(fetched) for one in held]


def stored_trace(experience: Any) -> StoredTrace:
    """Of an experience of one response."""
    return experience.info[TRACE_KEY][0]


def for_training(batches: list[Any]) -> list[Any]:
    """Experience of several responses each, without what the controller alone looks at."""
    for batch in batches:
        batch.info = {**batch.info, TRACE_KEY: [trace.held for trace in batch.info[TRACE_KEY]]}
    return batches
