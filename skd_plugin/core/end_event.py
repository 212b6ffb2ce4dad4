"""Tokens that end a turn, as one event: the first of them stands for all.

A base student ends with one token, its instruct teacher with another. Each is next to impossible to the other model,
so that what the student proposes as its end would be rejected, and the loss would teach it to end in another way.
Here their probabilities are added up on both sides, before anything looks at a distribution: the first token has the
sum, and the others cannot come.

Shapes: X leading dimensions, V vocabulary, E tokens that end a turn.
"""

from __future__ import annotations

import torch


def join_ends(logits_XV: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A copy in which the first of these tokens has the probability of all; gradients go to each by its share.

    Args:
        logits_XV: logits or log-probabilities, which need not be normalised; joined ones stay as they are.
        ends_E: int64, each once.
    """
    return logits_XV.index_copy(-1, ends_E, _joined(logits_XV, ends_E))


def join_ends_(logits_XV: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The same in place, where no gradient is wanted."""
    return logits_XV.index_copy_(-1, ends_E, _joined(logits_XV, ends_E))


def _joined(logits_XV: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    own_XE = logits_XV.index_select(-1, ends_E)
    precise = torch.promote_types(own_XE.dtype, torch.float32)
    sum_X1 = own_XE.to(precise).logsumexp(-1, keepdim=True).to(own_XE.dtype)
    # The lowest number and not -inf: its probability is 0 all the same, and 0 times it is no NaN.
    nothing_XE = torch.full_like(own_XE[..., 1:], torch.finfo(own_XE.dtype).min)
    return torch.cat([sum_X1, nothing_XE], -1)
