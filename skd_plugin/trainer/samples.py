"""From rollouts to training batches: the host's sample generator and experience maker, with the traces kept."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray.vllm_engine import batch_vllm_engine_call

from skd_plugin.core.rng import derive_seed
from skd_plugin.rollout.actor import TRACE_KEY
from skd_plugin.rollout.rule import SamplingRule


class SKDSamplesGenerator(SamplesGenerator):
    """Tells the engines by which rule to sample, and keeps each response's trace in `Experience.info`.

    A field of a subclass would be dropped when the host splits and joins batches; a per-sample list in `info` is not.
    """

    def __init__(self, *args: Any, rule: SamplingRule, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule = rule
        self.seed = seed
        self.step = 0  # mixed into the random streams, so that a prompt met again is answered anew

    def generate_samples(self, **generate_kwargs: Any) -> Any:
        self._sample_by(self.rule, derive_seed(self.seed, self.step))
        self.step += 1
        samples, *others, exhausted = super().generate_samples(**generate_kwargs)
        if len(samples) < self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt:
            # The end of the dataset does not fill a batch. The host would fail where it has fewer samples than actors,
            # or stop in the middle of DeepSpeed's accumulation.
            samples = []
        return samples, *others, exhausted

    @torch.no_grad()
    def generate_eval_samples(self, *, rule: SamplingRule, **generate_kwargs: Any) -> list[Experience]:
        """Responses to all held-out prompts, in the order in which they were finished.

        All at once: the host would wait for each rollout batch of them to end before it sends the next.
        """
        self._sample_by(rule, derive_seed(self.seed, -1))
        samples, _, _ = self._generate_vllm(
            dataloader_iter=iter(self.eval_dataloader),
            num_prompts=len(self.eval_dataloader),
            dynamic_filtering=False,
            **generate_kwargs,
        )
        return samples

    def _sample_by(self, rule: SamplingRule, seed: int) -> None:
        batch_vllm_engine_call(self.vllm_engines, "set_rule", rule, seed)

    def _process_response_into_experience(self, response: dict[str, Any], **generate_kwargs: Any) -> Experience:
        experience = super()._process_response_into_experience(response, **generate_kwargs)
        experience.info[TRACE_KEY] = [response[TRACE_KEY]]
        return experience


class SKDExperienceMaker(RemoteExperienceMaker):
    """Reward-free experience: no forward of any model is spent between the rollout and the training step."""

    @torch.no_grad()
    def make_experience_batch(self, rollout_samples: list[Experience]) -> list[Experience]:
        batches = self.split_rollout_samples(rollout_samples)
        for batch in batches:
            if batch.rewards is None:  # the host prints and averages a reward; there is none
                batch.info["reward"] = torch.full((len(batch.sequences),), float("nan"))
        return batches
