"""How much a token counts in the distillation loss, by what was seen of it while sampling. p is the teacher.

Shapes: R response tokens, V vocabulary.

A weighting gives each token a need r in [0, 1]; its weight is w = floor + (1 - floor) r. The trainer multiplies the
weights of an optimizer step by (their number / their sum) over all ranks, so that they have mean 1 and the loss keeps
its scale. That is one factor for all tokens, so whatever the step holds, no token counts less than `floor` times
another. Weights are constants to the gradient: they come from the rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from skd_plugin.core.trace import NOTHING, Trace

Weigher = Callable[[Trace], torch.Tensor]  # -> float32 [R], not negative, not normalised


def even(trace: Trace, vocab_size: int) -> torch.Tensor:
    """r = 1."""
    return torch.ones(len(trace))


def confidence(trace: Trace, vocab_size: int) -> torch.Tensor:
    """r = 1 - H(p) / log V: 1 where the teacher is certain, 0 where it is uniform. H at temperature 1."""
    return 1 - trace.teacher_entropy / math.log(vocab_size)


def divergence(trace: Trace, vocab_size: int) -> torch.Tensor:
    """r = 1 - exp(-KL(p||q)), with the student that sampled; about KL where it is small.

    It bounds TV(p, q)^2 from above (Bretagnolle and Huber 1978), and keeps one token with a huge KL from taking all
    the weight of a step. r = 1 where KL was not recorded, because nothing was drafted: no reason to spare the token.
    """
    return (1 - torch.exp(-trace.kl.clamp_min(0))).nan_to_num(nan=1.0)


def rank(trace: Trace, vocab_size: int) -> torch.Tensor:
    """r = log(1 + rank) / log V, rank the student's proposal among the teacher's tokens, 0 the most probable.

    0 where the student proposed the teacher's favourite, 1 where it proposed its last choice. In a replaced token it
    is the rank of what was thrown away. r = 1 where nothing was proposed.
    """
    need = torch.log1p(trace.draft_rank.clamp_min(0).float()) / math.log(vocab_size)
    return torch.where(trace.draft_rank == NOTHING, 1.0, need)


def early(trace: Trace, vocab_size: int) -> torch.Tensor:
    """r = 1 - t / R at place t of a response of R tokens: what comes late stands on all that went wrong before.

    In the spirit of IW-OPD (arXiv 2606.22600), which finds that the last tokens of a response teach next to nothing.
    """
    return 1 - torch.arange(len(trace)) / max(len(trace), 1)


class Weighting(NamedTuple):
    need: Callable[[Trace, int], torch.Tensor]  # (trace, tokens of the vocabulary) -> r, float32 [R]
    words: str  # which tokens count more, for people
    of_whole: bool = False  # it takes the teacher's whole distribution while sampling


WEIGHTINGS: dict[str, Weighting] = {
    "none": Weighting(even, "all tokens count the same"),
    "confidence": Weighting(confidence, "those where the teacher is sure", of_whole=True),
    "divergence": Weighting(divergence, "those where the models differed while sampling", of_whole=True),
    "early": Weighting(early, "the first of a response"),
    "rank": Weighting(rank, "those whose proposal the teacher ranks low"),
}


def make_weigher(by: str, floor: float, vocab_size: int, prefix_tokens: int | None = None) -> Weigher:
    """The token weights of a recipe, of the tokens of one response.

    Args:
        by: a name of `WEIGHTINGS`.
        floor: in [0, 1), the least weight of a token relative to the most.
        vocab_size: tokens of the teacher's distribution, at least 2.
        prefix_tokens: those behind them have the weight 0: only a prefix is learned (FastOPD, Prune-OPD, arXiv
            2605.07804). None: all are learned.

    Raises:
        KeyError: no weighting of that name.
    """
    need = WEIGHTINGS[by].need

    def weigh(trace: Trace) -> torch.Tensor:
        weights_R = floor + (1 - floor) * need(trace, vocab_size).clamp(0, 1)
        if prefix_tokens is not None:
            weights_R[prefix_tokens:] = 0.0
        return weights_R

    return weigh
