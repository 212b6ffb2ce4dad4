"""Functions of whole next-token distributions, from hidden states, without ever holding the distributions of a batch.

An output head turns a hidden state of H numbers into V logits. Here it is applied to a chunk of tokens, the chunk's
values are read off, and its logits are thrown away, so that the memory is that of C x V logits and not of N x V.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H width of the student, J width of the teacher. p is the teacher,
q the student, both at temperature 1. Logits come from the head in the type of its weight; everything that follows is
float32, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from skd_plugin.core.end_event import join_ends, join_ends_

# (rows of the chunk, log q [C, V]) -> [C], differentiable in log q, which it must not change.
ChunkLoss = Callable[[slice, torch.Tensor], torch.Tensor]

# (rows of the chunk, log p [C, V], log q [C, V]) -> [C], likewise.
PairLoss = Callable[[slice, torch.Tensor, torch.Tensor], torch.Tensor]

# (rows of the chunk, log q [C, V]) -> values [C] each. Differentiable in log q, which it must not change.
Readings = Callable[[slice, torch.Tensor], list[torch.Tensor]]

FEW_LOGITS = 1 << 22  # cost no memory to speak of: a chunk that has fewer costs time alone
SAME_RATIO = 1e-6  # gradients agree with the expected ones up to one factor, to float32 rounding
GATHERED_CHUNKS = 4  # whose gradients are added to that of a head of half precision at once
HEAD_BLOCK = 32_768  # rows of that head at once


class Scores(NamedTuple):
    """float32 [N] each; None where it was not asked for."""

    log_prob: torch.Tensor  # log q of the named tokens
    entropy: torch.Tensor | None  # of q
    loss: torch.Tensor | None


class HeadLoss(NamedTuple):
    """A loss of q at N tokens."""

    of_chunk: ChunkLoss
    # The gradient of the final loss to each token's loss [N], up to one common factor. Where it proves right, and
    # nothing but these losses is differentiated, the backward pass costs next to nothing; otherwise it computes every
    # chunk again. The gradients are the same.
    expected_N: torch.Tensor | None = None

    def of(self, own: slice) -> HeadLoss:
        """Of these of its tokens alone."""

        def of_chunk(rows: slice, log_q_CV: torch.Tensor) -> torch.Tensor:
            return self.of_chunk(slice(own.start + rows.start, own.start + rows.stop), log_q_CV)

        return HeadLoss(of_chunk, None if self.expected_N is None else self.expected_N[own])


def chunked_scores(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    *,
    tokens_N: torch.Tensor,
    chunk: int,
    vocab: int | None = None,
    ends_E: torch.Tensor | None = None,
    entropy: bool = False,
    loss: HeadLoss | None = None,
) -> Scores:
    """What the student says of `tokens_N`, and a loss of its distributions. Gradients go to hidden states and head.

    Args:
        tokens_N: int64, the tokens whose log q is wanted.
        chunk: tokens whose logits are in memory at once (C).
        vocab: only the first so many rows of the head are tokens; the others are padding, without mass or gradient.
        ends_E: tokens that end a turn, which are one; see `join_ends`. None: each is itself.
        entropy: the entropy is wanted, too.
    """
    vocab = len(head_VH) if vocab is None else vocab

    def read(rows: slice, log_q_CV: torch.Tensor) -> list[torch.Tensor]:
        log_q_CV = log_q_CV if ends_E is None else join_ends(log_q_CV, ends_E)
        losses = [] if loss is None else [loss.of_chunk(rows, log_q_CV)]
        return losses + _token_readings(tokens_N, entropy, rows, log_q_CV)

    expected_N = loss.expected_N if loss is not None and torch.is_grad_enabled() else None
    values = list(_Chunked.apply(hidden_NH, head_VH, read, 1 + entropy + (loss is not None), chunk, vocab, expected_N))
    found = values.pop(0) if loss is not None else None
    return Scores(values[0], values[1] if entropy else None, found)


def against_teacher(
    hidden_NJ: torch.Tensor, head_VJ: torch.Tensor, loss: PairLoss, ends_E: torch.Tensor | None = None
) -> ChunkLoss:
    """A loss against the teacher's whole distribution, from its hidden states and output head, which get no gradient.

    Args:
        head_VJ: of as many tokens as the student has.
        ends_E: as in `chunked_scores`.
    """
    return against_teachers(hidden_NJ, [head_VJ], None, loss, ends_E)


def against_teachers(
    hidden_NJ: torch.Tensor,
    heads: Sequence[torch.Tensor],
    teacher_N: torch.Tensor | None,
    loss: PairLoss,
    ends_E: torch.Tensor | None = None,
) -> ChunkLoss:
    """The same of several teachers, each token with its own.

    Args:
        hidden_NJ: J is the widest teacher's width; of another one, what is behind its own width is not read.
        heads: of each teacher, [V, its width].
        teacher_N: places in `heads`; of one it is not read.
    """

    def log_p(rows: slice) -> torch.Tensor:
        if len(heads) == 1 or teacher_N is None:
            return _log_softmax(hidden_NJ[rows], heads[0])
        hidden_CJ = hidden_NJ[rows]
        found_CV = hidden_CJ.new_empty(len(hidden_CJ), len(heads[0]), dtype=torch.float32)
        for place, head_VJ in enumerate(heads):
            own = (teacher_N[rows] == place).nonzero().squeeze(1)
            if len(own):
                found_CV[own] = _log_softmax(hidden_CJ[own, : head_VJ.shape[1]], head_VJ)
        return found_CV

    def of_chunk(rows: slice, log_q_CV: torch.Tensor) -> torch.Tensor:
        log_p_CV = log_p(rows)
        return loss(rows, log_p_CV if ends_E is None else join_ends_(log_p_CV, ends_E), log_q_CV)

    return of_chunk


def _token_readings(tokens_N: torch.Tensor, entropy: bool, rows: slice, log_q_CV: torch.Tensor) -> list[torch.Tensor]:
    log_prob_C = log_q_CV.gather(1, tokens_N[rows, None]).squeeze(1)
    return [log_prob_C, -(log_q_CV.exp() * log_q_CV).sum(-1)] if entropy else [log_prob_C]


class _Chunked(torch.autograd.Function):
    """`count` readings of the head's distribution at every token, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_VH: torch.Tensor,
        read: Readings,
        count: int,
        chunk: int,
        vocab: int,
        expected_N: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NH, head_VH)
        ctx.read, ctx.chunk, ctx.vocab, ctx.expected = read, chunk, vocab, expected_N
        ctx.ready = None if expected_N is None else _Gradients(hidden_NH, head_VH, chunk, vocab, ctx.needs_input_grad)
        values = hidden_NH.new_empty(count, len(hidden_NH), dtype=torch.float32)
        for rows in _slices(len(hidden_NH), chunk):
            log_q_CV = _log_softmax(hidden_NH[rows], head_VH[:vocab])
            with torch.set_grad_enabled(ctx.ready is not None):
                readings = read(rows, log_q_CV.requires_grad_(ctx.ready is not None))
            values[:, rows] = torch.stack(readings).detach()
            if expected_N is not None:
                ctx.ready.add(rows, log_q_CV, readings[:1], [expected_N[rows]])
            del readings  # and with them their graph, before the next chunk is made
        return values.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, head_VH = ctx.saved_tensors
        wanted = [(place, g) for place, g in enumerate(gradients) if g is not None and g.any()]
        found, ctx.ready = ctx.ready, None  # used up: they are scaled in place
        factor = None if found is None else _common_factor(wanted, ctx.expected)
        if factor is None:
            factor, found = 1.0, _Gradients(hidden_NH, head_VH, ctx.chunk, ctx.vocab, ctx.needs_input_grad)
            for rows in _slices(len(hidden_NH) if wanted else 0, ctx.chunk):
                log_q_CV = _log_softmax(hidden_NH[rows], head_VH[: ctx.vocab]).requires_grad_()
                with torch.enable_grad():
                    readings = ctx.read(rows, log_q_CV)
                found.add(rows, log_q_CV, [readings[place] for place, _ in wanted], [g[rows] for _, g in wanted])
                del readings
        return *found.scaled(factor), None, None, None, None, None


class _Gradients:
    """Sums of a loss's gradients to hidden states and head, in float32."""

    def __init__(
        self, hidden_NH: torch.Tensor, head_VH: torch.Tensor, chunk: int, vocab: int, needed: Sequence[bool]
    ) -> None:
        self._hidden_NH, self._head_VH, self._vocab = hidden_NH, head_VH, vocab
        self._to_hidden = torch.zeros_like(hidden_NH, dtype=torch.float32) if needed[0] else None
        self._to_head = _HeadGradient(head_VH, chunk, vocab) if needed[1] else None

    def add(
        self, rows: slice, log_q_CV: torch.Tensor, readings: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        """Adds a chunk's part, from the gradients of the loss to its readings."""
        (to_log_q_CV,) = torch.autograd.grad(readings, log_q_CV, gradients)
        q_CV = log_q_CV.detach().exp_()  # the graph is gone, and nobody needs log q any more
        to_logits_CV = torch.addcmul(to_log_q_CV, q_CV, to_log_q_CV.sum(-1, keepdim=True), value=-1)
        del to_log_q_CV, q_CV
        to_logits_CV = to_logits_CV.to(self._head_VH.dtype)
        if self._to_hidden is not None:
            self._to_hidden[rows] = (to_logits_CV @ self._head_VH[: self._vocab]).float()
        if self._to_head is not None:
            self._to_head.add(to_logits_CV, self._hidden_NH[rows])

    def scaled(self, factor: float) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """To the hidden states and to the head, times `factor`, in their types. The sums are used up."""
        to_hidden = None if self._to_hidden is None else self._to_hidden.mul_(factor).to(self._hidden_NH.dtype)
        to_head = None if self._to_head is None else self._to_head.total().mul_(factor).to(self._head_VH.dtype)
        return to_hidden, to_head


class _HeadGradient:
    """Sum of (gradient to a token's logits) x (its hidden state) over tokens, float32 [V, H].

    A product of half precision cannot be added into a float32 sum in one operation, and the sum is large. So a few
    chunks are gathered for each addition, which is made in blocks of rows.
    """

    def __init__(self, head_VH: torch.Tensor, chunk: int, vocab: int) -> None:
        self._sum_VH = torch.zeros_like(head_VH, dtype=torch.float32)
        self._used_VH = self._sum_VH[:vocab]
        self._direct = head_VH.dtype == torch.float32
        size = 0 if self._direct else GATHERED_CHUNKS * chunk
        self._to_logits = head_VH.new_empty(size, vocab)
        self._hidden = head_VH.new_empty(size, head_VH.shape[1])
        self._filled = 0

    def add(self, to_logits_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        if self._direct:
            self._used_VH.addmm_(to_logits_CV.T, hidden_CH)
            return
        if self._filled + len(hidden_CH) > len(self._hidden):
            self._multiply()
        rows = slice(self._filled, self._filled + len(hidden_CH))
        self._to_logits[rows], self._hidden[rows] = to_logits_CV, hidden_CH
        self._filled = rows.stop

    def total(self) -> torch.Tensor:
        if self._filled:
            self._multiply()
        self._to_logits = self._hidden = self._hidden[:0]
        return self._sum_VH

    def _multiply(self) -> None:
        to_logits, hidden = self._to_logits[: self._filled], self._hidden[: self._filled]
        for total, part in zip(self._used_VH.split(HEAD_BLOCK), to_logits.split(HEAD_BLOCK, dim=1), strict=True):
            total += part.T @ hidden
        self._filled = 0


def _log_softmax(hidden_CH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return linear(hidden_CH, head_VH).log_softmax(-1, dtype=torch.float32)


def _common_factor(wanted: list[tuple[int, torch.Tensor]], expected_N: torch.Tensor) -> float | None:
    """c with gradient = c x expected, if the first reading is all that has a gradient, and if there is such a c."""
    if not wanted:
        return 0.0
    if [place for place, _ in wanted] != [0]:
        return None
    found_N, expected_N = wanted[0][1].double(), expected_N.double()
    factor = ((found_N @ expected_N) / (expected_N @ expected_N)).item()
    limit = SAME_RATIO * abs(factor) * expected_N.abs().max()
    return factor if ((found_N - factor * expected_N).abs() <= limit).all() else None


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
