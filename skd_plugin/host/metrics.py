"""Metrics of the two losses of a step, from what OpenRLHF's training step says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from skd_plugin.config.objective import Coefficients
from skd_plugin.core.trace import Drawn

POLICY_METRICS = {  # name in OpenRLHF's status -> ours
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
    status: dict[str, Any], drawn: Sequence[Drawn], coefficients: Coefficients
) -> dict[str, float | None]:
    """Metrics of the two losses; those of the policy only where it takes part or rewards are measured.

    Args:
        status: what OpenRLHF's training step returned.
        drawn: of the step's responses.
    """
    metrics = {"skd/loss": status.get("skd_loss"), "skd/kd_coef": coefficients.kd}
    reward = status.get("rollout/reward_mean")
    if reward is not None and not math.isnan(reward):
        metrics["rl/reward"] = reward
    if coefficients.rl:
        own = torch.cat([of_one.students_own for of_one in drawn]).float().mean().item()
        metrics |= {"rl/coef": coefficients.rl, "rl/own_frac": own}
        metrics |= {ours: status[theirs] for theirs, ours in POLICY_METRICS.items() if theirs in status}
    return metrics
