"""The acceptance rule of SKD and the assembly of a verified block.

Shapes: N drafted tokens of all requests in one row (request by request), B requests, L draft length, V vocabulary.
p is the teacher, q the student.
"""

from __future__ import annotations

import torch

# Provenance of a token; the letters of a trace are in core.trace.
ACCEPTED = 0  # proposed by the student and kept
REPLACED = 1  # drawn from the teacher in place of a rejected proposal
UNDRAFTED = 2  # the teacher's, where the student proposed nothing
REFERENCE = 3  # of a given text
RESAMPLED = 4  # drawn from the student a second time, inside what the gate keeps
FLAGGED = 5  # rejected by the gate, but left in the text (the control without write-back)
NOTHING = -1  # no token: an unused place of a block, or nothing was rejected


def teacher_rank(teacher_logits_NV: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    """Rank of a token under the teacher: 0 is the most probable; the lower id goes first among equal logits.

    Returns:
        int64 [N].
    """
    own_N1 = teacher_logits_NV.gather(1, token_N[:, None])
    ids_V = torch.arange(teacher_logits_NV.shape[1], device=token_N.device)
    above = teacher_logits_NV > own_N1
    tied_before = (teacher_logits_NV == own_N1) & (ids_V[None] < token_N[:, None])
    return (above | tied_before).sum(-1)


def top_k_gate(rank_N: torch.Tensor, top_k_N: torch.Tensor) -> torch.Tensor:
    """SKD's rule (arXiv 2410.11325, Algorithm 1): keep a proposal that is among the teacher's K most probable tokens.

    The rank is taken on the teacher's raw logits: temperature would not change it, nucleus truncation would.
    With A the teacher's top-K and S = sum of q over A, the law of the next token is
        m(v) = 1[v in A] q(v) + (1 - S) p(v),
    which is q for K = V and p for K = 0.

    Returns:
        bool [N], True where the proposal is kept.
    """
    return rank_N < top_k_N


def assemble_block(
    draft_BL: torch.Tensor, accepted_BL: torch.Tensor, replacement_BL: torch.Tensor, num_drafts_B: torch.Tensor
) -> torch.Tensor:
    """Tokens that a verified block emits.

    A kept proposal is emitted, a rejected one gives way to the teacher's token. The block ends behind the first token
    that differs from its proposal, because what was drafted after it was drafted for another prefix. There is no bonus
    token after a fully kept block: the next token must be proposed by the student.

    Returns:
        int64 [B, L]; `NOTHING` behind the end of a block. Every request with a draft emits at least one token.
    """
    emitted_BL = torch.where(accepted_BL, draft_BL, replacement_BL)
    place_L = torch.arange(draft_BL.shape[1], device=draft_BL.device)
    drafted_BL = place_L[None] < num_drafts_B[:, None]
    intact_BL = ((emitted_BL == draft_BL) & drafted_BL).cumprod(1)
    reached_BL = torch.cat([torch.ones_like(intact_BL[:, :1]), intact_BL[:, :-1]], dim=1).bool()
    return torch.where(reached_BL & drafted_BL, emitted_BL, NOTHING)
