"""Legs of the teacher: where the gate rejects a proposal, the teacher writes on for some tokens before it hands back.

Relay-OPD (arXiv 2607.26057), with any gate as what trips. A response is in one of three states, each a function of
its tokens so far and never of blocks. p is the teacher's distribution and q the student's, after their temperatures
and nuclei; p1 is p at temperature 1, untruncated. The law of the next token:

    in a leg                         p                                  source HANDED
    else, fewer than M legs so far   the gate's                         a REPLACED token begins a leg of L tokens
    else                             q                                  every proposal stays

The replacing token is the first of the L. A leg ends early, before a token at whose place H(p1) <= `until`: there the
student proposes again, and its proposal is put to the gate. L = 1 with any number of legs is the gate alone.

Shapes: N drafted tokens of all requests in one row, B requests, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from skd_plugin.core import rng, sampling
from skd_plugin.core.copies import to_device
from skd_plugin.core.gates import from_residual
from skd_plugin.core.proposals import Proposals
from skd_plugin.core.sampling import SettingRows
from skd_plugin.core.trace import Source
from skd_plugin.core.verify import Verdict


class Legs(NamedTuple):
    """Where responses stand, one entry a response (or, after each token, an entry a token)."""

    left: torch.Tensor  # int64, tokens of the present leg that are still to come; 0 outside of one
    begun: torch.Tensor  # int64, legs so far


def teachers_text(proposals: Proposals) -> torch.Tensor:
    """Tokens int64 [N] with exactly the distribution p, as many of them the proposals as can be.

    Speculative sampling (arXiv 2211.17192): so a leg costs no forward of the teacher that it need not. A place in a
    leg is put to no gate, so the coin and the teacher's random number of its position are free.
    """
    own_N1 = proposals.draft_N[:, None]
    p_N = proposals.teacher_probs_NV.gather(1, own_N1).squeeze(1)
    q_N = proposals.student_probs_NV.gather(1, own_N1).squeeze(1)
    noise_N = rng.uniform(proposals.seed_N, proposals.position_N, rng.TEACHER)
    other_N = sampling.draw(from_residual(proposals), noise_N)
    return torch.where(proposals.coin_N * q_N < p_N, proposals.draft_N, other_N)


def hand_over(
    proposals: Proposals,
    settings: SettingRows,
    draft_N: torch.Tensor,
    verdict: Verdict,
    legs_B: Legs,
    request_N: torch.Tensor,
    place_N: torch.Tensor,
) -> tuple[Verdict, Legs]:
    """What becomes of each proposal if all before it in its block were emitted.

    Waits once for the device, where the proposals are, if a response may be in a leg; everything else is in ordinary
    memory.

    Args:
        settings: of each proposal.
        draft_N: the proposals' tokens.
        verdict: the gate's; of a request without hand-over it stays.
        legs_B: where each response stands before its block.
        request_N: int64, the request of each proposal.
        place_N: int64, its place in the block, 0 the first.

    Returns:
        The verdict, and where the response stands after each token [N].
    """
    token_N, source_N = verdict.token_N.clone(), verdict.source_N.clone()
    left_B, begun_B = legs_B.left.clone(), legs_B.begun.clone()
    after_N = Legs(torch.zeros_like(token_N), torch.zeros_like(token_N))
    trips_N = (source_N == Source.REPLACED) & (settings.hand_over_len > 0)
    first_B = torch.full_like(left_B, len(place_N)).scatter_reduce_(0, request_N[trips_N], place_N[trips_N], "amin")
    text_N, calm_N = _written(proposals, (left_B[request_N] > 0) | (place_N > first_B[request_N]))
    for place in range(int(place_N.max()) + 1):
        rows_R = (place_N == place).nonzero().squeeze(1)
        request_R, own = request_N[rows_R], settings.select(rows_R)
        in_leg_R = (left_B[request_R] > 0) & ~calm_N[rows_R]
        rows = rows_R[in_leg_R]
        token_N[rows], source_N[rows] = text_N[rows], Source.HANDED
        rows = rows_R[~in_leg_R & (begun_B[request_R] >= own.hand_overs)]
        token_N[rows], source_N[rows] = draft_N[rows], Source.ACCEPTED
        trips_R = (source_N[rows_R] == Source.REPLACED) & (own.hand_over_len > 0)
        goes_on_R = torch.where(in_leg_R, left_B[request_R] - 1, 0)
        left_B[request_R] = torch.where(trips_R, own.hand_over_len - 1, goes_on_R)
        begun_B[request_R] += trips_R
        after_N.left[rows_R], after_N.begun[rows_R] = left_B[request_R], begun_B[request_R]
    return verdict._replace(token_N=token_N, source_N=source_N), after_N


def _written(proposals: Proposals, possible_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the places that may be in a leg: the teacher's text int64 [N], and whether a leg ends before it, bool [N]."""
    found_2N = torch.zeros(2, len(possible_N), dtype=torch.int64)
    rows = possible_N.nonzero().squeeze(1)
    if len(rows):
        device = proposals.draft_N.device
        parts = proposals.in_parts(to_device(rows, device))
        found = [torch.stack([teachers_text(part), _is_calm(part).long()]) for _, part in parts]
        found_2N[:, rows] = torch.cat(found, dim=1).cpu()
    return found_2N[0], found_2N[1].bool()


def _is_calm(proposals: Proposals) -> torch.Tensor:
    """Where a leg ends early, bool [N]."""
    entropy_N = torch.special.entr(proposals.teacher_logp_NV.exp()).sum(-1)
    return entropy_N <= proposals.settings.hand_over_until
