"""Functions of whole next-token distributions, from hidden states, without ever holding the distributions of a batch.

An output head turns a hidden state of H numbers into V logits. Here it is applied to a chunk of tokens, the chunk's
values are read off, and its logits are thrown away, so that the memory is that of C x V logits and not of N x V.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H width of the student, J width of the teacher. p is the teacher,
q the student. Logits come from the head in the type of its weight; everything behind them is float32, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from skd_plugin.core.losses import Divergence

# (rows of the chunk, log q [C, V]) -> values [C] each. Differentiable in log q, which it must not change.
Readings = Callable[[slice, torch.Tensor], list[torch.Tensor]]

SAME_RATIO = 1e-6  # gradients agree with the expected ones up to one factor, to float32 rounding
HEAD_BLOCK = 16_384  # rows of the head whose gradient is multiplied at once where that needs a copy


class Scores(NamedTuple):
    """float32 [N] each."""

    divergence: torch.Tensor  # from teacher to student
    log_prob: torch.Tensor  # log q of the named tokens
    entropy: torch.Tensor | None  # of q, where it was asked for


def chunked_divergence(
    student_hidden_NH: torch.Tensor,
    student_head_VH: torch.Tensor,
    teacher_hidden_NJ: torch.Tensor,
    teacher_head_VJ: torch.Tensor,
    divergence: Divergence,
    *,
    tokens_N: torch.Tensor,
    chunk: int,
    vocab: int | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    expected_N: torch.Tensor | None = None,
) -> Scores:
    """Divergence of the student from the teacher over the whole vocabulary, and the student's view of `tokens_N`.

    Gradients go to the student's hidden states and head, never to the teacher.

    Args:
        tokens_N: int64, the tokens whose log q is wanted.
        chunk: tokens whose logits are in memory at once (C).
        vocab: only the first so many rows of both heads are tokens; the others are padding, without mass or gradient.
        temperature: both models' logits are divided by it for the divergence. `log_prob` and `entropy` are at 1.
        expected_N: the gradient of the final loss to each divergence, up to one common factor. Where it proves right
            and nothing but the divergence is differentiated, the backward pass costs next to nothing; otherwise it
            computes every chunk again. The gradients are the same.
    """
    vocab = len(student_head_VH) if vocab is None else vocab

    @torch.no_grad()
    def teacher_logp(rows: slice) -> torch.Tensor:
        logits_CV = linear(teacher_hidden_NJ[rows], teacher_head_VJ[:vocab]).float()
        return (logits_CV if temperature == 1 else logits_CV / temperature).log_softmax(-1)

    def read(rows: slice, log_q_CV: torch.Tensor) -> list[torch.Tensor]:
        softened_CV = log_q_CV if temperature == 1 else (log_q_CV / temperature).log_softmax(-1)
        return [divergence(teacher_logp(rows), softened_CV), *_token_readings(tokens_N, entropy, rows, log_q_CV)]

    expected_N = expected_N if torch.is_grad_enabled() else None
    values = _Chunked.apply(student_hidden_NH, student_head_VH, read, 2 + entropy, chunk, vocab, expected_N)
    return Scores(values[0], values[1], values[2] if entropy else None)


def chunked_log_probs(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    *,
    tokens_N: torch.Tensor,
    chunk: int,
    vocab: int | None = None,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log q of `tokens_N` and the entropy of q, where it is asked for: float32 [N]. See `chunked_divergence`."""
    vocab = len(head_VH) if vocab is None else vocab
    read = partial(_token_readings, tokens_N, entropy)
    values = _Chunked.apply(hidden_NH, head_VH, read, 1 + entropy, chunk, vocab, None)
    return values[0], values[1] if entropy else None


def _token_readings(
    tokens_N: torch.Tensor, entropy: bool, rows: slice, log_q_CV: torch.Tensor
) -> list[torch.Tensor]:
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
        ctx.ready = None if expected_N is None else _Gradients(hidden_NH, head_VH, vocab, ctx.needs_input_grad)
        values = hidden_NH.new_empty(count, len(hidden_NH), dtype=torch.float32)
        for rows in _slices(len(hidden_NH), chunk):
            log_q_CV = _log_softmax(hidden_NH[rows], head_VH[:vocab])
            with torch.set_grad_enabled(ctx.ready is not None):
                readings = read(rows, log_q_CV.requires_grad_(ctx.ready is not None))
            values[:, rows] = torch.stack(readings).detach()
            if ctx.ready is not None:
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
            factor, found = 1.0, _Gradients(hidden_NH, head_VH, ctx.vocab, ctx.needs_input_grad)
            for rows in _slices(len(hidden_NH) if wanted else 0, ctx.chunk):
                log_q_CV = _log_softmax(hidden_NH[rows], head_VH[: ctx.vocab]).requires_grad_()
                with torch.enable_grad():
                    readings = ctx.read(rows, log_q_CV)
                found.add(rows, log_q_CV, [readings[place] for place, _ in wanted], [g[rows] for _, g in wanted])
                del readings
        return *found.scaled(factor), None, None, None, None, None


class _Gradients:
    """Sums of a loss's gradients to hidden states and head, in float32."""

    def __init__(self, hidden_NH: torch.Tensor, head_VH: torch.Tensor, vocab: int, needed: Sequence[bool]) -> None:
        self._inputs, self._vocab = (hidden_NH, head_VH), vocab
        self._sums = [
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if need else None
            for x, need in zip(self._inputs, needed, strict=False)
        ]

    def add(
        self, rows: slice, log_q_CV: torch.Tensor, readings: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        """Adds a chunk's part, from the gradients of the loss to its readings."""
        hidden_NH, head_VH = self._inputs
        sum_NH, sum_VH = self._sums
        (to_log_q_CV,) = torch.autograd.grad(readings, log_q_CV, gradients)
        q_CV = log_q_CV.detach().exp_()  # the graph is gone, and nobody needs log q any more
        logits_CV = torch.addcmul(to_log_q_CV, q_CV, to_log_q_CV.sum(-1, keepdim=True), value=-1).to(head_VH.dtype)
        del to_log_q_CV, q_CV
        if sum_NH is not None:
            sum_NH[rows] = (logits_CV @ head_VH[: self._vocab]).float()
        if sum_VH is not None:
            _add_product(sum_VH[: self._vocab], logits_CV.T, hidden_NH[rows])

    def scaled(self, factor: float) -> list[torch.Tensor | None]:
        return [
            None if total is None else total.mul_(factor).to(x.dtype)
            for total, x in zip(self._sums, self._inputs, strict=True)
        ]


def _log_softmax(hidden_CH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return linear(hidden_CH, head_VH).float().log_softmax(-1)


def _add_product(sum_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor) -> None:
    """sum += left @ right. Products of half precision are made in blocks, because they cannot go into a float32."""
    if left_VC.dtype == torch.float32:
        sum_VH.addmm_(left_VC, right_CH)
        return
    for block, left in zip(sum_VH.split(HEAD_BLOCK), left_VC.split(HEAD_BLOCK), strict=True):
        block += left @ right_CH


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
    return (slice(start, start + size) for start in range(0, count, size))
