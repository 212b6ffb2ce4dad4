"""A micro-batch of a training step, with what its loss needs beside OpenRLHF's tensors.

Shapes: B sequences of T tokens, N response tokens of the batch; per-token tensors are [B, T - 1] (core/layout.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypedDict, TypeVar

import torch
import torch.distributed as dist
from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer
from openrlhf.utils.loss_utils import _get_dp_group, _optimizer_step_loss_norm

from skd_plugin.core.layout import ResponseLayout
from skd_plugin.core.trace import Drawn, Source, Trace
from skd_plugin.host.trace_store import PROMPT_WEIGHT, TRACE_KEY

TINY = 1e-20  # in place of a total of 0

# Tokens with a policy gradient beside the student's own, by skd.objective.replaced_tokens.
TEACHER_SOURCES: dict[str, tuple[Source, ...]] = {"exclude": (), "importance": (Source.REPLACED, Source.HANDED)}

Of = TypeVar("Of", bound=Drawn)


def present(traces: Sequence[Of], layout: ResponseLayout) -> list[Of]:
    """The records of the responses of a batch; end to end they are those of its N response tokens.

    A sequence that OpenRLHF cut at `max_len` has fewer response tokens than its trace; those at its end are left out.
    """
    return [trace.slice(0, count) for trace, count in zip(traces, layout.counts(), strict=True)]


class Totals(TypedDict, total=False):
    """What OpenRLHF's losses divide by: of an optimizer step, over all ranks, by the number of its micro-batches
    (`_optimizer_step_loss_norm`).
    """

    dp_size: int
    batch_num_tokens: torch.Tensor
    global_batch_size: torch.Tensor  # sequences


def per_token(experience: Any, value_of: Callable[[Drawn], torch.Tensor]) -> torch.Tensor:
    """Values of an experience's response tokens as one of OpenRLHF's tensors [B, T - 1]; 0 elsewhere."""
    layout = ResponseLayout.of(experience.action_mask)
    responses = present([trace.drawn for trace in experience.info[TRACE_KEY]], layout)
    return layout.spread(value_of(Drawn.join(responses)))


@dataclass(frozen=True)
class MicroBatch:
    layout: ResponseLayout
    tokens: Trace  # on the CPU
    token_weights_N: torch.Tensor  # float32, of the distillation loss; mean 1 over the tokens of an optimizer step
    policy_mask: torch.Tensor  # bool [B, T - 1], tokens with a policy gradient
    teacher_tokens: torch.Tensor  # bool [B, T - 1], those among them that the student did not draw
    policy_totals: Totals  # of `policy_mask`
    ends_step: bool  # the optimizer takes its step after it

    def completed(self, totals: StepTotals, *, ends_step: bool) -> MicroBatch:
        weights_N = self.token_weights_N * totals.weight_factor
        return replace(self, token_weights_N=weights_N, policy_totals=totals.policy, ends_step=ends_step)

    def to(self, device: torch.device) -> MicroBatch:
        """With everything but the record of the tokens on this device."""
        moved = ("layout", "token_weights_N", "policy_mask", "teacher_tokens")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


@dataclass(frozen=True)
class StepTotals:
    """What the micro-batches of one optimizer step have in common, over all ranks."""

    response: Totals
    policy: Totals
    weight_factor: torch.Tensor  # that makes the mean token weight 1


class OptimizerStepBatches:
    """Takes the place of OpenRLHF's `iter_grad_accum_global_norm`: makes the micro-batches of an optimizer step
    together, so that each part of the loss is a mean over its own tokens of the whole step, and dilutes no other.
    """

    def __init__(self, weighting: Callable[[Trace], torch.Tensor], replaced_tokens: str, *, packed: bool) -> None:
        """
        Args:
            weighting: token weights [R] of a response, not negative, of any mean.
            replaced_tokens: a name of `TEACHER_SOURCES`.
            packed: the model's output is of sequences as OpenRLHF's `unpad_and_slice_tensor` packs them.
        """
        self._weighting = weighting
        self._teacher_sources = TEACHER_SOURCES[replaced_tokens]
        self._packed = packed

    def __call__(
        self,
        experiences: Iterable[Any],
        strategy: Any,
        accumulated_gradient: int,
        mask_of: Callable[[Any], torch.Tensor],
    ) -> Iterator[tuple[Any, Totals]]:
        """Yields (experience, OpenRLHF's totals) as OpenRLHF's function does; each experience has a `batch`.

        Args:
            mask_of: OpenRLHF's, of an experience: the mask of its response tokens, which the batch knows, too.
        """
        experiences = iter(experiences)
        count = max(int(accumulated_gradient), 1)
        while window := list(islice(experiences, count)):
            batches = [self.batch_of(experience) for experience in window]
            totals = self.totals(batches, strategy, divided_by=count)
            for place, (experience, batch) in enumerate(zip(window, batches, strict=True)):
                experience.batch = batch.completed(totals, ends_step=place == count - 1)
                yield experience, totals.response

    def totals(self, batches: list[MicroBatch], strategy: Any, *, divided_by: int) -> StepTotals:
        """Of this rank's micro-batches of an optimizer step.

        Args:
            divided_by: the number of micro-batches by which DeepSpeed divides each one's loss.
        """
        dp_group = _get_dp_group(strategy)
        dp_size = dist.get_world_size(dp_group) if dist.is_initialized() else 1

        def over_all_ranks(values: Iterable[torch.Tensor]) -> Totals:
            return _optimizer_step_loss_norm(values, dp_group, dp_size, divided_by)

        response = over_all_ranks(batch.layout.action_mask for batch in batches)
        weights = over_all_ranks(batch.layout.spread(batch.token_weights_N) for batch in batches)["batch_num_tokens"]
        policy = over_all_ranks(batch.policy_mask for batch in batches)
        for name in ("batch_num_tokens", "global_batch_size"):
            # A step without a single token for the policy loss has the loss 0, not 0 / 0.
            policy[name] = policy[name].clamp_min(TINY)
        return StepTotals(response, policy, (response["batch_num_tokens"] / weights.clamp_min(TINY)).cpu())

    def batch_of(self, experience: Any) -> MicroBatch:
        """The micro-batch of one experience, before the totals of its optimizer step are known.

        Raises:
            RuntimeError: a sequence does not hold the tokens of its trace; training would teach the wrong tokens.
        """
        mask = experience.action_mask
        layout = ResponseLayout.packed(mask, experience.attention_mask) if self._packed else ResponseLayout.of(mask)
        # Popped, because OpenRLHF makes a metric of everything that it finds in `info`.
        responses = present(experience.info.pop(TRACE_KEY), layout)
        tokens = Trace.join(responses)
        if not torch.equal(layout.tokens(experience.sequences), tokens.response_ids.to(experience.sequences)):
            raise RuntimeError(
                "the response tokens of a training batch are not those of its traces; an executor changed the ids "
                "after sampling (it must never decode and re-tokenise)"
            )
        teacher_tokens = layout.spread(tokens.is_from(*self._teacher_sources))
        own = layout.spread(tokens.students_own)
        of_prompts = experience.info.pop(PROMPT_WEIGHT, [1.0] * len(responses))
        weights = [own * self._weighting(response) for own, response in zip(of_prompts, responses, strict=True)]
        weights_N = torch.cat(weights)
        return MicroBatch(layout, tokens, weights_N, own | teacher_tokens, teacher_tokens, {}, ends_step=True)


class DynamicBatches(NaiveReplayBuffer):
    """OpenRLHF's replay buffer in a run with dynamic batches. Its items are micro-batches, of as many tokens as fit,
    in the order of training; each has its `batch`. OpenRLHF normalises them by what it finds here
    (`get_loss_batch_info`), of samples that `balance_experiences` has spread over the ranks.
    """

    def __init__(self, batches: OptimizerStepBatches, hosts: NaiveReplayBuffer) -> None:
        """`hosts`: the buffer whose place it takes."""
        super().__init__(
            hosts.sample_batch_size, hosts.limit, hosts.cpu_offload, hosts.packing_samples, hosts.dynamic_batch
        )
        self._batches = batches
        self._totals: list[StepTotals] = []  # of each micro-batch

    def setup_dynamic_batch(self, strategy: Any) -> None:
        """OpenRLHF's plan of a step's micro-batches, and the totals of each of its updates."""
        super().setup_dynamic_batch(strategy)
        self._totals, update = [], []
        for place, ends_step in enumerate(self.dynamic_optimizer_step):
            update.append(self._batches.batch_of(self._experience(place)))
            if ends_step:  # DeepSpeed is told one micro-batch, so that it divides by 1
                self._totals += [self._batches.totals(update, strategy, divided_by=1)] * len(update)
                update = []

    def __getitem__(self, place: int) -> Any:
        experience = self._experience(place)
        batch = self._batches.batch_of(experience)
        experience.batch = batch.completed(self._totals[place], ends_step=bool(self.dynamic_optimizer_step[place]))
        return experience

    def collate_fn(self, batch: list[Any]) -> Any:
        return batch[0]

    def _experience(self, place: int) -> Any:
        return super().collate_fn([super().__getitem__(place)])
