"""What a training step minimises: kd_coef x distillation + rl_coef x OpenRLHF's policy loss, each over its own tokens.

Shapes: N response tokens of a micro-batch; per-token tensors are [B, T - 1] (core/layout.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from openrlhf.models import PolicyLoss, aggregate_loss

from skd_plugin.config.objective import Coefficients
from skd_plugin.host.batch import MicroBatch, Totals
from skd_plugin.host.distillation import Distillation


class Objective:
    """The loss of a run; `step` makes the one of a micro-batch."""

    def __init__(
        self,
        distillation: Distillation,
        policy_loss: PolicyLoss,
        token_level_loss: bool,
        student_tolerance: float | None = None,
    ) -> None:
        """
        Args:
            token_level_loss: a mean over tokens, else over sequences of their means.
            student_tolerance: nats; see `compare_students`. None: the two cannot be compared.
        """
        self.distillation = distillation
        self.policy_loss = policy_loss
        self.token_level_loss = token_level_loss
        self._coefficients: Coefficients | None = None
        self._student_tolerance = student_tolerance
        self._compared = True
        self._student_version = 0

    def begin_step(self, coefficients: Coefficients, student_version: int = 0) -> None:
        """
        Args:
            coefficients: from now on. One that is 0 takes no part, so that a run with one loss is exactly a run
                without the other.
            student_version: updates that the trainer's student has had.

        Raises:
            ValueError: both are zero; there would be nothing to learn.
        """
        if not any(coefficients):
            raise ValueError("skd.objective.kd_coef and rl_coef are both 0 in this step; give one of them a value")
        self._coefficients = coefficients
        self._student_version = student_version
        self._compared = False

    def compare_students(self, batch: MicroBatch, log_probs: torch.Tensor) -> None:
        """Before its first update a step's student is the one that the engine sampled with, so both must think the
        same of the text; of what an older student has proposed in an asynchronous run nothing can be said. The first
        micro-batch of each step is looked at, which costs nothing: wrong attention, a model that the two libraries
        read in two ways, or weights that did not arrive in the engine end the run here.

        Args:
            log_probs: of the trainer's student, at OpenRLHF's entries [B, T - 1].

        Raises:
            RuntimeError: the mean difference is above the tolerance.
        """
        if self._compared or self._student_tolerance is None:
            return
        self._compared = True
        ours_N = batch.layout.take(log_probs.detach()).float().cpu()
        known_N = batch.tokens.student_logp.isfinite() & (batch.tokens.student_version == self._student_version)
        if not known_N.any():
            return
        engines_N = batch.tokens.student_logp[known_N]
        gap = (ours_N[known_N] - engines_N).abs().mean().item()
        if not gap <= self._student_tolerance:
            raise RuntimeError(
                f"the student in the engine is not the one in the trainer: log q of {len(engines_N)} sampled tokens "
                f"is {engines_N.mean():.4f} on average there and {ours_N[known_N].mean():.4f} here, {gap:.4f} nats "
                f"apart a token, where {self._student_tolerance:g} is rounding. vLLM computes this architecture in "
                "another way, or has not taken its new weights; nothing was updated by this step. Run skd check, and "
                "report it"
            )

    @contextmanager
    def step(self, student: torch.nn.Module, experience: Any) -> Iterator[StepLoss]:
        """While it is open, the training forward of `student` also gives the token losses of the experience's batch,
        and what is yielded reduces them: OpenRLHF calls first the one and then the other, without a batch of ours.
        """
        if self._coefficients is None:
            raise RuntimeError("the loss has no coefficients yet: SKDTrainer did not begin this step")
        loss = StepLoss(self, self._coefficients, experience)
        hooks = []
        if self._coefficients.kd:
            hooks = [
                student.register_forward_pre_hook(loss.before_forward, with_kwargs=True),
                student.register_forward_hook(loss.after_forward),
            ]
        try:
            yield loss
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def finite_gradients(embeddings: torch.nn.Module, step: int) -> Iterator[None]:
    """While it is open, a backward pass in which a gradient is not finite ends before anything is updated.

    Looked at is the gradient [B, T, H] that arrives at the output of the input embeddings. It is the last one of a
    backward pass, so that a NaN of any loss or layer is in it, at 1 / V of what the logits' would cost and whatever
    ZeRO does with parameters. DeepSpeed's norm is no help: it has none in float32, and elsewhere skips such a step or
    turns its norm into 1, without a word. Frozen embeddings have no gradient, and are not looked at.

    Raises:
        FloatingPointError: in the backward pass.
    """

    def check(gradient_BTH: torch.Tensor) -> None:
        if not gradient_BTH.sum(dtype=torch.float32).isfinite():  # one pass, no copy; NaN and inf stay in a sum
            raise FloatingPointError(
                f"the gradient of step {step} is not finite, though its loss is; nothing was updated by it. Lower "
                "openrlhf.actor.adam.lr or try another skd.loss.kind, and start again from the last checkpoint"
            )

    def watch(module: torch.nn.Module, args: Any, output_BTH: torch.Tensor) -> None:
        if output_BTH.requires_grad:
            output_BTH.register_hook(check)

    hook = embeddings.register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()


class StepLoss:
    """The loss of one micro-batch: targets and forward, token losses, reduction. Stands where OpenRLHF has its
    PolicyLoss: same arguments, same five results, which its `training_step` unpacks.
    """

    def __init__(self, objective: Objective, coefficients: Coefficients, experience: Any) -> None:
        self._objective = objective
        self._coefficients = coefficients
        self._batch: MicroBatch = experience.batch.to(experience.action_mask.device)
        self._info: dict[str, Any] = experience.info  # OpenRLHF makes metrics of what is in it
        self._token_losses_N: torch.Tensor | None = None

    def before_forward(self, student: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | self._objective.distillation.forward_arguments(self._batch)

    def after_forward(self, student: torch.nn.Module, args: Any, result: Any) -> None:
        _, output = result  # the training forward returns log-probs and the model's output
        self._token_losses_N = self._objective.distillation.token_losses(self._batch, output)

    def __call__(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        action_mask: torch.Tensor,
        rollout_log_probs: torch.Tensor,
        **totals: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """Returns (loss, clip ratio, PPO's KL, rollout KL, filter ratio); the policy's are in the batch's info."""
        self._objective.compare_students(self._batch, log_probs)
        loss = nothing = torch.zeros((), device=log_probs.device)
        if self._coefficients.kd:
            loss = loss + self._coefficients.kd * self._distillation_loss(action_mask, Totals(**totals))
        if self._coefficients.rl:
            policy = self._policy_loss(log_probs, old_log_probs, advantages, rollout_log_probs)
            loss = loss + self._coefficients.rl * policy
        if not torch.isfinite(loss):
            scalars = {k: v for k, v in self._info.items() if isinstance(v, torch.Tensor) and v.dim() == 0}
            shown = ", ".join(f"{name} {value.item():.3g}" for name, value in scalars.items())
            raise FloatingPointError(
                f"the loss is {loss.item()} ({shown}). The student has diverged or a model's logits are not finite: "
                "lower openrlhf.actor.adam.lr or openrlhf.actor.max_norm, and start again from the last checkpoint"
            )
        return loss, nothing, nothing, None, None

    def _distillation_loss(self, action_mask: torch.Tensor, totals: Totals) -> torch.Tensor:
        """Divergence from the teacher over all response tokens."""
        if self._token_losses_N is None:
            raise RuntimeError("there are no token losses: OpenRLHF's Actor did not run its forward hooks")
        layout = self._batch.layout
        weights_N = self._batch.token_weights_N
        values_N = torch.where(weights_N == 0, 0.0, self._token_losses_N * weights_N)  # 0 of an infinite one, too
        self._info["skd_loss"] = (values_N.sum() / max(len(layout), 1)).detach()
        return aggregate_loss(
            layout.spread(values_N), action_mask, token_level_loss=self._objective.token_level_loss, **totals
        )

    def _policy_loss(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        rollout_log_probs: torch.Tensor,
    ) -> torch.Tensor:
        """OpenRLHF's policy loss over the tokens of `policy_mask`, with their own total.

        A token that the teacher wrote was not drawn from the student, so by default it gets no policy gradient. Where
        the recipe wants it weighted instead (`replaced_tokens: importance`), it is in the mask, and its old log-prob
        is that of the distribution it was drawn from, the teacher's: the ratio is q(v) / p(v), bounded by the clip.
        """
        batch = self._batch
        old = torch.where(batch.teacher_tokens, rollout_log_probs, old_log_probs)
        loss, clip_ratio, kl, rollout_kl, filtered = self._objective.policy_loss(
            log_probs,
            old,
            advantages,
            action_mask=batch.policy_mask,
            rollout_log_probs=rollout_log_probs,
            **batch.policy_totals,
        )
        metrics = {"rl_loss": loss, "rl_clip_ratio": clip_ratio, "rl_kl": kl}
        if rollout_kl is not None:
            metrics |= {"rl_rollout_kl": rollout_kl, "rl_filtered": filtered}
        # Means over no token at all are 0 / 0; OpenRLHF would carry the NaN into the mean of the whole step.
        self._info.update({name: value.detach().nan_to_num(0.0) for name, value in metrics.items()})
        return loss
