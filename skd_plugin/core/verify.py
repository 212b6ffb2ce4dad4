"""Puts proposals to their gates, draws what takes the place of the rejected ones, and says what a block emits.

Shapes: N drafted tokens of all requests in one row (request by request), B requests, L draft length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from skd_plugin.core import rng, sampling
from skd_plugin.core.copies import to_device
from skd_plugin.core.gates import Gate
from skd_plugin.core.proposals import Proposals
from skd_plugin.core.trace import NOTHING, Source


class Verdict(NamedTuple):
    token_N: torch.Tensor  # int64, the proposal or what takes its place
    source_N: torch.Tensor  # int64, codes of `Source`
    rank_N: torch.Tensor  # int64, of the proposal on the teacher's raw logits


@dataclass(frozen=True)
class Group:
    """Proposals that are judged alike."""

    gate: Gate | None  # None: a given text, of which every token stays
    rows: torch.Tensor | None  # bool [N], which these are, in ordinary memory; None: all


def judge(gate: Gate, proposals: Proposals) -> Verdict:
    """Puts every proposal to one gate."""
    return judge_groups([Group(gate, None)], proposals)


def judge_groups(groups: Sequence[Group], proposals: Proposals) -> Verdict:
    """Puts every proposal to the gate of its group and draws what takes the place of the rejected ones.

    Waits once for the device: for which proposals are kept. A group knows its rows without that.
    """
    token_N, rank_N = proposals.draft_N.clone(), torch.empty_like(proposals.draft_N)
    source_N, kept_N = torch.zeros_like(rank_N), torch.ones_like(rank_N, dtype=torch.bool)
    for group in groups:
        own_N = _numbers(group.rows, token_N.device)
        at_once = group.gate is None or group.gate.keeps_without_logits
        for rows, part in [proposals.some(own_N)] if at_once else proposals.in_parts(own_N):
            rank_N[rows] = part.rank_N
            if group.gate is None:
                source_N[rows] = Source.REFERENCE
            else:
                kept_N[rows] = group.gate.keep(part)
    rejected_N = ~kept_N.cpu()
    for group in groups:
        own_N = rejected_N if group.rows is None else rejected_N & group.rows
        if group.gate is not None and bool(own_N.any()):
            for rows, part in proposals.in_parts(_numbers(own_N, token_N.device)):
                token_N[rows], source_N[rows] = _instead(group.gate, part)
    return Verdict(token_N, source_N, rank_N)


def _numbers(mask_N: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Of the rows of a mask in ordinary memory."""
    return None if mask_N is None else to_device(mask_N.nonzero().squeeze(1), device)


def _instead(gate: Gate, lost: Proposals) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes the place of rejected proposals, and its source."""
    noise_N = rng.uniform(lost.seed_N, lost.position_N, rng.TEACHER)
    if gate.replaces_from_teacher:
        token_N = lost.teacher.sample(lost.settings, "teacher", noise_N)
    else:
        token_N = sampling.draw(gate.replacement(lost), noise_N)
    source_N = torch.full_like(token_N, Source.REPLACED)
    if gate.again is None:
        return token_N, source_N
    probs_NV = gate.again(lost)
    again_N = sampling.draw(probs_NV, rng.uniform(lost.seed_N, lost.position_N, rng.AGAIN))
    possible_N = probs_NV.sum(-1) > 0
    return torch.where(possible_N, again_N, token_N), source_N.masked_fill(possible_N, Source.RESAMPLED)


def assemble_block(
    draft_BL: torch.Tensor, accepted_BL: torch.Tensor, replacement_BL: torch.Tensor, num_drafts_B: torch.Tensor
) -> torch.Tensor:
    """Tokens that a verified block emits.

    A kept proposal is emitted, a rejected one gives way to the teacher's token. The block ends after the first token
    that differs from its proposal, because what was drafted after it was drafted for another prefix. There is no bonus
    token after a fully kept block: the next token must be proposed by the student.

    Returns:
        int64 [B, L]; `NOTHING` after the end of a block. Every request with a draft emits at least one token.
    """
    emitted_BL = torch.where(accepted_BL, draft_BL, replacement_BL)
    place_L = torch.arange(draft_BL.shape[1], device=draft_BL.device)
    drafted_BL = place_L[None] < num_drafts_B[:, None]
    intact_BL = ((emitted_BL == draft_BL) & drafted_BL).cumprod(1)
    reached_BL = torch.cat([torch.ones_like(intact_BL[:, :1]), intact_BL[:, :-1]], dim=1).bool()
    return torch.where(reached_BL & drafted_BL, emitted_BL, NOTHING)
