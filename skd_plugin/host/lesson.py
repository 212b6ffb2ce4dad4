"""What a training batch carries beside the host's tensors: its traces, and which tokens count how much in which term.

Shapes: B sequences, T tokens each; per-token tensors are [B, T - 1]: entry t belongs to token t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from skd_plugin.core.token_weights import Weigher
from skd_plugin.core.trace import Source, Trace
from skd_plugin.host.rollout_actor import TRACE_KEY

_TINY = 1e-20


@dataclass
class Lesson:
    traces: list[Trace]  # B of them, as long as their rows' response tokens
    sequences: torch.Tensor  # [B, T]
    weights: torch.Tensor  # float32, of the distillation loss; mean 1 over the tokens of an optimizer step
    policy_mask: torch.Tensor  # bool, tokens with a policy gradient
    foreign: torch.Tensor  # bool, those among them that the student did not draw
    policy_totals: dict[str, Any] = field(default_factory=dict)  # the host's `loss_batch_info` of `policy_mask`


def in_layout(action_mask: torch.Tensor, traces: list[Trace], value_of: Callable[[Trace], torch.Tensor]) -> Any:
    """Per-token values of traces in the host's layout [B, T - 1]; 0 outside the response tokens.

    A sequence that the host cut at `max_len` has fewer response tokens than its trace; those at the end are gone.
    """
    counts = action_mask.bool().sum(1).tolist()
    parts = [value_of(trace)[:count] for trace, count in zip(traces, counts, strict=True)]
    values = torch.cat(parts).to(action_mask.device)
    layout = torch.zeros(action_mask.shape, dtype=values.dtype, device=action_mask.device)
    layout[action_mask.bool()] = values
    return layout


def from_source(trace: Trace, codes: tuple[int, ...]) -> torch.Tensor:
    """Which tokens have one of these origins: bool [R]."""
    return torch.isin(trace.source, torch.tensor(codes, dtype=trace.source.dtype))


def students_own(trace: Trace) -> torch.Tensor:
    """Tokens drawn from the student's distribution and left in the text: bool [R]."""
    return from_source(trace, (Source.ACCEPTED, Source.FLAGGED))


class LessonPlan:
    """Takes the place of the host's `iter_grad_accum_global_norm`: gives each batch its lesson, and the lessons of one
    optimizer step their common totals, so that neither term is diluted by the tokens of the other.
    """

    def __init__(self, host_totals: Callable[..., Iterator], weigher: Weigher, replaced_tokens: str) -> None:
        self._host_totals = host_totals
        self._weigher = weigher
        self._foreign_codes = {"exclude": (), "importance": (Source.REPLACED,)}[replaced_tokens]

    def __call__(
        self, batches: Iterable[Any], strategy: Any, accumulated_gradient: int, mask_of: Callable[[Any], torch.Tensor]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields (experience, the host's totals) as the host's function does; each experience has a `lesson`."""
        batches = iter(batches)
        while window := list(islice(batches, max(int(accumulated_gradient), 1))):
            for experience in window:
                experience.lesson = self.lesson(experience)

            def totals(value_of: Callable[[Any], torch.Tensor], window: list[Any] = window) -> dict[str, Any]:
                return next(iter(self._host_totals(window, strategy, accumulated_gradient, value_of)))[1]

            tokens = totals(mask_of)
            weights = totals(lambda e: e.lesson.weights)["batch_num_tokens"]
            policy = totals(lambda e: e.lesson.policy_mask)
            # A step without a single token for the policy loss has the loss 0, not 0 / 0.
            policy = {n: total if n == "dp_size" else total.clamp_min(_TINY) for n, total in policy.items()}
            for experience in window:
                experience.lesson.weights *= (tokens["batch_num_tokens"] / weights.clamp_min(_TINY)).cpu()
                experience.lesson.policy_totals = policy
                yield experience, tokens

    def lesson(self, experience: Any) -> Lesson:
        # Popped, because the host makes a metric of everything that it finds in `info`.
        traces = experience.info.pop(TRACE_KEY)
        mask = experience.action_mask.bool()
        foreign = in_layout(mask, traces, lambda trace: from_source(trace, self._foreign_codes))
        own = in_layout(mask, traces, students_own)
        weights = in_layout(mask, traces, self._weigher)
        return Lesson(traces, experience.sequences, weights, own | foreign, foreign)
