"""OpenRLHF's PPO trainer as the controller of a distillation run."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_trainer import PPOTrainer
from openrlhf.trainer.ppo_utils import samples_generator
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin import trust
from skd_plugin.host.evaluation import HeldOut
from skd_plugin.host.run_prompts import RunPrompts
from skd_plugin.host.run_samples import RunSamples
from skd_plugin.host.samples import CalmBar
from skd_plugin.host.training_side import RULE_STATE, TrainingSide
from skd_plugin.seams import plain_class, rebind

HostTrainer = plain_class(PPOTrainer)


def prepare_process(args: Any) -> None:
    """In the process that reads the prompts, before OpenRLHF's code does."""
    trust.close_transformers()
    torch.manual_seed(args.train.seed)  # OpenRLHF's prompt loader shuffles by a number drawn from it
    rebind(ppo_trainer, "PromptDataset", RunPrompts)  # its prepare_datasets names it
    rebind(samples_generator, "tqdm", CalmBar)  # its _generate_vllm names it


class SKDTrainer(TrainingSide, HostTrainer):
    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        prepare_process(strategy.args)
        rebind(ppo_trainer, "SamplesGenerator", RunSamples)
        super().__init__(pretrain, strategy, *args, **kwargs)
        self.set_up(self.samples_generator.planned_steps, self.samples_generator.clock)
        self._held_out = HeldOut(self.samples_generator, self.generate_kwargs)

    def fit(self, global_step: int = 0) -> None:
        states = self.resume()
        step = states["global_step"]
        self.samples_generator.resume(step, states.get(RULE_STATE))
        self.log_evaluation(step, self._held_out.measure_before_training(step, self.broadcast_to_vllm))
        self.folder.status.stage("training", planned_steps=self.planned_steps)
        self.clock.lap()
        super().fit(global_step)
        step = self.samples_generator.step
        self.end(step, self._held_out.measure_after_training(step))
        self.folder.status.stage("saving")

    def train_step(self, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        self.sampled = self.samples_generator.sampled
        return super().train_step(rollout_samples, global_step)

    def evaluate(self, global_step: int, **generate_kwargs: Any) -> dict[str, float]:
        """In place of OpenRLHF's."""
        with self.clock.part("evaluation"):
            metrics = self._held_out.measure_student(global_step)
        self.log_evaluation(global_step, metrics)
        return metrics
