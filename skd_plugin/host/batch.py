"""A micro-batch of a training step, with what its loss needs beside OpenRLHF's tensors.

Shapes: B sequences of T tokens, N response tokens of the batch; per-token tensors are [B, T - 1] (core/layout.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypedDict

import torch

from skd_plugin.core.layout import ResponseLayout
from skd_plugin.core.trace import Source, Trace

TRACE_KEY = "skd"  # of a response, and of Experience.info
TINY = 1e-20  # in place of a total of 0

# Tokens with a policy gradient beside the student's own, by skd.objective.replaced_tokens.
TEACHER_SOURCES: dict[str, tuple[Source, ...]] = {"exclude": (), "importance": (Source.REPLACED,)}


def joined(traces: list[Trace], layout: ResponseLayout) -> Trace:
    """The record of the N response tokens of a batch.

    A sequence that OpenRLHF cut at `max_len` has fewer response tokens than its trace; those at its end are left out.
    """
    return Trace.join([trace.slice(0, count) for trace, count in zip(traces, layout.counts(), strict=True)])


class Totals(TypedDict, total=False):
    """What OpenRLHF's losses divide by: of an optimizer step, over all ranks, by the number of its micro-batches
    (`_optimizer_step_loss_norm`).
    """

    dp_size: int
    batch_num_tokens: torch.Tensor
    global_batch_size: torch.Tensor  # sequences


def trace_of(experience: Any) -> Trace:
    """The record of an experience of one response."""
    return experience.info[TRACE_KEY][0]


def per_token(experience: Any, value_of: Callable[[Trace], torch.Tensor]) -> torch.Tensor:
    """Values of an experience's response tokens as one of OpenRLHF's tensors [B, T - 1]; 0 elsewhere."""
    layout = ResponseLayout.of(experience.action_mask)
    return layout.spread(value_of(joined(experience.info[TRACE_KEY], layout)))


@dataclass(frozen=True)
class MicroBatch:
    layout: ResponseLayout
    tokens: Trace  # on the CPU
    token_weights_N: torch.Tensor  # float32, of the distillation loss; mean 1 over the tokens of an optimizer step
    policy_mask: torch.Tensor  # bool [B, T - 1], tokens with a policy gradient
    teacher_tokens: torch.Tensor  # bool [B, T - 1], those among them that the student did not draw
    policy_totals: Totals  # of `policy_mask`

    def to(self, device: torch.device) -> MicroBatch:
        """With everything but the record of the tokens on this device."""
        moved = ("layout", "token_weights_N", "policy_mask", "teacher_tokens")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


class OptimizerStepBatches:
    """Takes the place of OpenRLHF's `iter_grad_accum_global_norm`: makes the micro-batches of an optimizer step
    together, so that each part of the loss is a mean over its own tokens of the whole step, and dilutes no other.
    """

    def __init__(
        self, host_totals: Callable[..., Iterator], weighting: Callable[[Trace], torch.Tensor], replaced_tokens: str
    ) -> None:
        """
        Args:
            host_totals: OpenRLHF's own function.
            weighting: token weights [R] of a trace, not negative, of any mean.
            replaced_tokens: a name of `TEACHER_SOURCES`.
        """
        self._host_totals = host_totals
        self._weighting = weighting
        self._teacher_sources = TEACHER_SOURCES[replaced_tokens]

    def __call__(
        self,
        experiences: Iterable[Any],
        strategy: Any,
        accumulated_gradient: int,
        mask_of: Callable[[Any], torch.Tensor],
    ) -> Iterator[tuple[Any, Totals]]:
        """Yields (experience, OpenRLHF's totals) as OpenRLHF's function does; each experience has a `batch`."""
        experiences = iter(experiences)
        while window := list(islice(experiences, max(int(accumulated_gradient), 1))):
            for experience in window:
                experience.batch = self.batch_of(experience)

            def totals(value_of: Callable[[Any], torch.Tensor], window: list[Any] = window) -> Totals:
                return next(iter(self._host_totals(window, strategy, accumulated_gradient, value_of)))[1]

            tokens = totals(mask_of)
            weights = totals(lambda e: e.batch.layout.spread(e.batch.token_weights_N))["batch_num_tokens"]
            policy = totals(lambda e: e.batch.policy_mask)
            for name in ("batch_num_tokens", "global_batch_size"):
                # A step without a single token for the policy loss has the loss 0, not 0 / 0.
                policy[name] = policy[name].clamp_min(TINY)
            factor = (tokens["batch_num_tokens"] / weights.clamp_min(TINY)).cpu()
            for experience in window:
                scaled = experience.batch.token_weights_N * factor
                experience.batch = replace(experience.batch, token_weights_N=scaled, policy_totals=policy)
                yield experience, tokens

    def batch_of(self, experience: Any) -> MicroBatch:
        """The micro-batch of one experience, before the totals of its optimizer step are known.

        Raises:
            RuntimeError: a sequence does not hold the tokens of its trace; training would teach the wrong tokens.
        """
        layout = ResponseLayout.of(experience.action_mask)
        # Popped, because OpenRLHF makes a metric of everything that it finds in `info`.
        tokens = joined(experience.info.pop(TRACE_KEY), layout)
        if not torch.equal(layout.tokens(experience.sequences), tokens.response_ids.to(experience.sequences)):
            raise RuntimeError(
                "the response tokens of a training batch are not those of its traces; an executor changed the ids "
                "after sampling (it must never decode and re-tokenise)"
            )
        teacher_tokens = layout.spread(tokens.is_from(*self._teacher_sources))
        own = layout.spread(tokens.students_own)
        return MicroBatch(layout, tokens, self._weighting(tokens), own | teacher_tokens, teacher_tokens, {})
