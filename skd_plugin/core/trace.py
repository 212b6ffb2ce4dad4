"""The record of one sampled response: which model each token is from, and what both models thought of it.

Shapes: R response tokens, K teacher entries kept a token, J width of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Self

import torch
from torch.nn.functional import pad

OVERLAP = 10  # first tokens of each model that are compared with each other; all of a smaller vocabulary
SMALL_BYTES = 1 << 16  # a tensor that is copied on its way to another process with others
NOTHING = -1  # no token: an unused place of a block, or nothing was rejected


class Source(IntEnum):
    """Where a token is from; `letter` names it in a trace file."""

    ACCEPTED = 0  # proposed by the student and kept
    REPLACED = 1  # drawn from the teacher in place of a rejected proposal
    UNDRAFTED = 2  # the teacher's, where the student proposed nothing; an engine that would emit one ends the run
    REFERENCE = 3  # of a given text
    RESAMPLED = 4  # drawn from the student a second time, inside what the gate keeps
    FLAGGED = 5  # rejected by the gate, but left in the text (the control without write-back)
    HANDED = 6  # the teacher's, in a leg that a rejection began; put to no gate

    @property
    def letter(self) -> str:
        return _LETTERS[self]


_LETTERS = "sturafh"  # by the codes of `Source`, in their order


@dataclass
class Drawn:
    """Which model drew each token of a response, and what both gave it: 9 bytes a token.

    Log-probabilities are natural, at temperature 1, over the whole vocabulary. A value that does not exist is NaN:
    nothing is known of the student where no token was drafted.
    """

    source: torch.Tensor  # uint8 [R], codes of `Source`
    student_logp: torch.Tensor  # float32 [R], log q(emitted token)
    teacher_logp: torch.Tensor  # float32 [R], log p(emitted token)

    def __len__(self) -> int:
        return len(self.source)

    def slice(self, start: int, stop: int) -> Self:
        """Tokens `start` to `stop`, as views."""
        if start == 0 and stop == len(self):
            return self
        return type(self)(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        parts = [part for part in parts if len(part)] or parts[:1]  # an empty one does not know the teacher's width
        if len(parts) == 1:
            return parts[0]
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process with all its small tensors as one piece of memory: one by one they take most of the way's
        time, to write and to read. A large one goes as it is, for Ray need not copy it.
        """
        tensors = [getattr(self, f.name) for f in fields(self)]
        large = {place: _alone(one) for place, one in enumerate(tensors) if one.nbytes > SMALL_BYTES}
        kinds: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
        for place, one in enumerate(tensors):
            if place not in large:
                kinds.setdefault((one.dtype, one.shape), []).append(place)
        # The widest numbers first, so that all are aligned.
        small = sorted(kinds.items(), key=lambda kind: -kind[0][0].itemsize)
        memory = bytearray().join(_bytes(tensors[place]) for _, places in small for place in places)
        return _read, (type(self), [(*kind, places) for kind, places in small], memory, large)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    @property
    def drawn(self) -> Drawn:
        """This alone of what is known of the tokens."""
        return Drawn(self.source, self.student_logp, self.teacher_logp)

    def is_from(self, *sources: Source) -> torch.Tensor:
        """Which tokens are from one of these sources: bool [R]."""
        found = torch.zeros_like(self.source, dtype=torch.bool)
        for source in sources:  # a few: faster than `isin`
            found |= self.source == source
        return found

    @property
    def students_own(self) -> torch.Tensor:
        """Tokens drawn from the student's distribution and left in the text: bool [R]."""
        return self.is_from(Source.ACCEPTED, Source.FLAGGED)

    @property
    def sampled_logp(self) -> torch.Tensor:
        """log-probability of each token under the model it is from: float32 [R]."""
        return torch.where(self.students_own, self.student_logp, self.teacher_logp)


# Fields that a line of a trace file has as they are.
_IN_FILES = (
    "response_ids rejected_ids draft_rank student_logp teacher_logp kl student_entropy teacher_entropy top_overlap "
    "same_first teacher_topk_ids teacher_topk_logp teacher_rest_tempered"
).split()


@dataclass
class Trace(Drawn):
    """Packed record of one response: everything that is known of its tokens."""

    response_ids: torch.Tensor  # int32 [R]
    # int32 [R], the student's proposal where another token was drawn, be it the same; NOTHING elsewhere
    rejected_ids: torch.Tensor
    draft_rank: torch.Tensor  # int32 [R], rank of the student's proposal under the teacher; NOTHING if undrafted
    kl: torch.Tensor  # float32 [R], KL(p||q) of the next-token distributions, nats
    student_entropy: torch.Tensor  # float32 [R], nats
    teacher_entropy: torch.Tensor  # float32 [R], nats
    top_overlap: torch.Tensor  # float32 [R], share of the teacher's OVERLAP first tokens that are the student's, too
    same_first: torch.Tensor  # float32 [R], 1 where the most probable token of both is the same, else 0
    # int32 [R, K], by falling probability; behind them the student's first (skd.loss.student_top_k), NOTHING in place
    # of one that is among the teacher's
    teacher_topk_ids: torch.Tensor
    teacher_topk_logp: torch.Tensor  # float32 [R, K], of these tokens; -inf of NOTHING
    # float32 [R], log of the sum of p^(1 / tau), tau the loss's, over all tokens but the K and the emitted one
    teacher_rest_tempered: torch.Tensor
    # [R, J], what the teacher's head made each token's p of; [R, 0], which needs not be given: not kept
    teacher_hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    # int32 [R], updates of its weights that the student had had when it proposed; 0, if not given
    student_version: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    # uint8 [R], which of the run's teachers this is about, by its place in the recipe; 0, if not given
    teacher: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def __post_init__(self) -> None:
        if len(self.student_version) != len(self):
            self.student_version = torch.zeros(len(self), dtype=torch.int32)
        if len(self.teacher) != len(self):
            self.teacher = torch.zeros(len(self), dtype=torch.uint8)
        if not self.teacher_hidden.shape[1]:
            self.teacher_hidden = torch.empty(len(self), 0)

    @classmethod
    def join(cls, parts: list[Trace]) -> Trace:
        """Hidden states of teachers of different widths get zeros behind them, up to that of the widest."""
        width = max((part.teacher_hidden.shape[1] for part in parts), default=0)
        return super().join([part._widened(width) if len(part) else part for part in parts])

    def _widened(self, width: int) -> Trace:
        missing = width - self.teacher_hidden.shape[1]
        return self if not missing else replace(self, teacher_hidden=pad(self.teacher_hidden, (0, missing)))

    @classmethod
    def empty(cls, num_teacher_entries: int) -> Trace:
        ints, floats = torch.empty(0, dtype=torch.int32), torch.empty(0)
        table = torch.empty(0, num_teacher_entries)
        return cls(
            response_ids=ints,
            source=ints.to(torch.uint8),
            rejected_ids=ints,
            draft_rank=ints,
            student_logp=floats,
            teacher_logp=floats,
            kl=floats,
            student_entropy=floats,
            teacher_entropy=floats,
            top_overlap=floats,
            same_first=floats,
            teacher_topk_ids=table.to(torch.int32),
            teacher_topk_logp=table,
            teacher_rest_tempered=floats,
        )

    def to_json(self, prompt_ids: list[int], finish: str) -> dict[str, Any]:
        """The documented line of a trace file, without the texts, for `run_folder.json_line`: numbers are numpy's."""
        numbers: dict[str, Any] = {name: getattr(self, name).contiguous().numpy() for name in _IN_FILES}
        kept = self.teacher_topk_ids != NOTHING
        if not bool(kept.all()):
            for name in ("teacher_topk_ids", "teacher_topk_logp"):
                rows = zip(getattr(self, name), kept, strict=True)
                numbers[name] = [row[own].numpy() for row, own in rows]
        letters = "".join(_LETTERS[code] for code in self.source.tolist())
        return {"prompt_ids": prompt_ids, "source": letters, **numbers, "finish": finish}


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own, all of which PyTorch sends."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _bytes(tensor: torch.Tensor) -> bytes:
    """Its numbers in their order."""
    if tensor.dtype == torch.bfloat16:  # numpy knows none
        tensor = tensor.contiguous().view(torch.int16)
    return tensor.numpy().tobytes()


def _read(
    cls: type[Drawn],
    kinds: list[tuple[torch.dtype, torch.Size, list[int]]],
    memory: bytearray,
    large: dict[int, torch.Tensor],
) -> Drawn:
    """
    Args:
        kinds: of the small tensors as they lie in memory: a type, a shape, and the places of the fields that have it.
        large: tensors by the field's place.
    """
    tensors, start = dict(large), 0
    for dtype, shape, places in kinds:
        count = len(places) * shape.numel()
        if count:
            block = torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(-1, *shape)
        else:
            block = torch.empty(len(places), *shape, dtype=dtype)
        tensors.update(zip(places, block.unbind(), strict=True))
        start += block.nbytes
    return cls(*(tensors[place] for place in range(len(tensors))))
