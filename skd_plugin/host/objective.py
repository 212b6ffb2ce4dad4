"""What a training step minimises: kd_coef x distillation + rl_coef x the host's policy loss, each over its own tokens.

Shapes: B sequences, T tokens each; per-token tensors are [B, T - 1] as everywhere in the host: entry t belongs to
token t + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from openrlhf.models import PolicyLoss, aggregate_loss

from skd_plugin.host.distillation import DistillationLoss
from skd_plugin.host.lesson import Lesson

Term = Callable[[dict[str, Any], Lesson], tuple[torch.Tensor, dict[str, torch.Tensor]]]  # -> (scalar loss, figures)


class Objective(torch.nn.Module):
    """Stands where the host has its PolicyLoss: same arguments, same five results.

    A term whose coefficient is zero is not computed, so that a run with one term is exactly a run without the other.
    """

    def __init__(self, terms: dict[str, Term]) -> None:
        super().__init__()
        self._terms = terms
        self._active: list[tuple[float, Term]] = []
        self._experience: Any = None

    def weigh(self, **coefficients: float) -> None:
        """The coefficients of the terms from now on.

        Raises:
            KeyError: a coefficient without a term.
            ValueError: all are zero; there would be nothing to learn.
        """
        self._active = [(value, self._terms[name]) for name, value in coefficients.items() if value]
        if not self._active:
            raise ValueError("skd.objective.kd_coef and rl_coef are both 0 in this step; give one of them a value")

    def expect(self, experience: Any) -> None:
        """The batch whose loss is asked for next; its `info` receives the figures of each term."""
        self._experience = experience

    def forward(
        self, log_probs: torch.Tensor, old_log_probs: Any, advantages: Any, action_mask: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """Returns (loss, clip ratio, PPO's KL, rollout KL, filter ratio); the terms report theirs in `info`."""
        call = dict(
            log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, action_mask=action_mask, **others
        )
        experience, self._experience = self._experience, None
        none = torch.zeros((), device=log_probs.device)
        loss = none
        for coefficient, term in self._active:
            value, figures = term(call, experience.lesson)
            loss = loss + coefficient * value
            experience.info.update(figures)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} ({_shown(experience.info)}). The student has diverged or a model's logits "
                "are not finite: lower openrlhf.actor.adam.lr or openrlhf.actor.max_norm, and start again from the "
                "last checkpoint"
            )
        return loss, none, none, None, None


class DistillationTerm:
    """Divergence from the teacher over all response tokens."""

    def __init__(self, loss: DistillationLoss, token_level_loss: bool) -> None:
        self._loss = loss
        self._token_level_loss = token_level_loss

    def __call__(self, call: dict[str, Any], lesson: Lesson) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = call["action_mask"]
        values = self._loss(mask, lesson.sequences, lesson.traces) * lesson.weights.to(mask.device)
        totals = {name: call[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size") if name in call}
        loss = aggregate_loss(values, mask, token_level_loss=self._token_level_loss, **totals)
        return loss, {"skd_loss": ((values * mask).sum() / mask.sum().clamp_min(1)).detach()}


class PolicyTerm:
    """The host's policy loss over the tokens of `lesson.policy_mask`, with their own total.

    A token that the teacher wrote was not drawn from the student, so by default it gets no policy gradient. Where the
    recipe wants it weighted instead (`replaced_tokens: importance`), it is in the mask, and its old log-probability is
    that of the law it was drawn from, the teacher's: the host's ratio then is q(v) / p(v), bounded by the host's clip.
    """

    def __init__(self, policy_loss: PolicyLoss) -> None:
        self._policy_loss = policy_loss

    def __call__(self, call: dict[str, Any], lesson: Lesson) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = lesson.policy_mask.to(call["action_mask"].device)
        foreign = lesson.foreign.to(mask.device)
        behaviour = call["rollout_log_probs"]
        old = torch.where(foreign, behaviour, call["old_log_probs"])
        loss, clip_ratio, kl, rollout_kl, filtered = self._policy_loss(
            call["log_probs"],
            old,
            call["advantages"],
            action_mask=mask,
            rollout_log_probs=behaviour,
            **lesson.policy_totals,
        )
        figures = {"rl_loss": loss, "rl_clip_ratio": clip_ratio, "rl_kl": kl}
        if rollout_kl is not None:
            figures |= {"rl_rollout_kl": rollout_kl, "rl_filtered": filtered}
        # Means over no token at all are 0 / 0; the host would carry the NaN into the mean of the whole step.
        return loss, {name: value.detach().nan_to_num(0.0) for name, value in figures.items()}


def _shown(info: dict[str, Any]) -> str:
    scalars = {k: v for k, v in info.items() if isinstance(v, torch.Tensor) and v.dim() == 0}
    return ", ".join(f"{name} {value.item():.3g}" for name, value in scalars.items())
