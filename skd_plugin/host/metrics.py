"""Figures of a step from its traces. README lists what each means."""

from __future__ import annotations

import math
from typing import Any

import torch

from skd_plugin.config.schema import Coefficients
from skd_plugin.core.trace import NOTHING, Source, Trace
from skd_plugin.host.batch import students_own

RARE_SOURCES = {
    "reference_frac": Source.REFERENCE,
    "resampled_frac": Source.RESAMPLED,
    "flagged_frac": Source.FLAGGED,
}  # not in every run


def rollout_metrics(traces: list[Trace], draft_len: int) -> dict[str, float]:
    """Token means over all responses, unless the name says otherwise.

    Args:
        draft_len: gamma, from which the number of drafted tokens follows.
    """
    tokens = Trace.join(traces)
    if not len(tokens):
        return {}
    drafted = tokens.draft_rank != NOTHING
    proposed = drafted & (tokens.source != Source.REFERENCE)
    known = tokens.student_entropy[drafted]
    shares = {name: (tokens.source == code).float().mean().item() for name, code in RARE_SOURCES.items()}
    return {
        "skd/accept_rate": _share(tokens.source[proposed] == Source.ACCEPTED),
        "skd/replaced_frac": (tokens.source == Source.REPLACED).float().mean().item(),
        "skd/undrafted_frac": (tokens.source == Source.UNDRAFTED).float().mean().item(),
        **{f"skd/{name}": share for name, share in shares.items() if share},
        "skd/first_replaced_pos": sum(_first_replaced(trace) for trace in traces) / len(traces),
        "skd/teacher_nll": -tokens.teacher_logp.mean().item(),
        "skd/teacher_topk_mass": tokens.teacher_topk_logp.exp().sum(-1).mean().item(),
        "skd/student_entropy": known.mean().item() if len(known) else float("nan"),
        "skd/kl": mean_kl(traces),
        "skd/draft_waste": draft_waste(traces, draft_len),
        "skd/response_len": len(tokens) / len(traces),
    }


POLICY_FIGURES = {  # name in the host's status -> ours
    "rl_loss": "rl/loss",
    "rl_clip_ratio": "rl/clip_ratio",
    "rl_kl": "rl/kl_to_old",
    "rl_rollout_kl": "rl/kl_to_rollout",
    "rl_filtered": "rl/filtered_frac",
    "return": "rl/return",
    "kl": "rl/kl_to_reference",
    "critic_loss": "rl/critic_loss",
}


def objective_metrics(
    status: dict[str, Any], traces: list[Trace], coefficients: Coefficients
) -> dict[str, float | None]:
    """Figures of the two terms of the loss; those of the policy only where it takes part or rewards are measured.

    Args:
        status: what the host's training step returned.
    """
    figures = {"skd/loss": status.get("skd_loss"), "skd/kd_coef": coefficients.kd}
    reward = status.get("rollout/reward_mean")
    if reward is not None and not math.isnan(reward):
        figures["rl/reward"] = reward
    if coefficients.rl:
        own = torch.cat([students_own(trace) for trace in traces]).float().mean().item()
        figures |= {"rl/coef": coefficients.rl, "rl/own_frac": own}
        figures |= {ours: status[theirs] for theirs, ours in POLICY_FIGURES.items() if theirs in status}
    return figures


def mean_kl(traces: list[Trace]) -> float:
    """Exact KL(p||q) of the next-token distributions, mean over the tokens of the responses, nats."""
    kl = torch.cat([trace.kl for trace in traces])
    kl = kl[~kl.isnan()]
    return kl.mean().item() if len(kl) else float("nan")


def draft_waste(traces: list[Trace], draft_len: int) -> float:
    """Share of the drafted tokens that were thrown away: behind a replacement, or behind the end of the response."""
    blocks = emitted = 0
    for trace in traces:
        changed = (trace.rejected_ids != NOTHING) & (trace.rejected_ids != trace.response_ids)
        left = 0
        drafted = trace.draft_rank != NOTHING
        for ends_block, has_draft in zip(changed.tolist(), drafted.tolist(), strict=True):
            if not has_draft:
                left = 0
                continue
            if left == 0:
                blocks, left = blocks + 1, draft_len
            left = 0 if ends_block else left - 1
        emitted += int(drafted.sum())
    return 1.0 - emitted / (blocks * draft_len) if blocks else 0.0


def _share(chosen: torch.Tensor) -> float:
    """NaN where there is nothing to choose from."""
    return chosen.float().mean().item()


def _first_replaced(trace: Trace) -> int:
    replaced = ((trace.source == Source.REPLACED) | (trace.source == Source.RESAMPLED)).nonzero()
    return int(replaced[0]) if len(replaced) else len(trace)
