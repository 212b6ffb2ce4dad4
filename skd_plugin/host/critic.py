"""OpenRLHF's critic actor, which trains on OpenRLHF's tensors alone."""

from __future__ import annotations

from typing import Any

import openrlhf.trainer.ray.ppo_critic as host

from skd_plugin import trust
from skd_plugin.host import on_cpu
from skd_plugin.host.trace_store import PROMPT_WEIGHT, TRACE_KEY
from skd_plugin.seams import plain_class, rebind


class DynamicCriticTrainer(host.CriticPPOTrainer):
    """OpenRLHF's, in a run with dynamic batches: see `SKDActorTrainer.training_step`."""

    def training_step(self, experience: Any, step: int, *args: Any, **kwargs: Any) -> dict[str, float]:
        ends_step = bool(self.replay_buffer.dynamic_optimizer_step[step])
        self.critic.set_gradient_accumulation_boundary(ends_step)
        return super().training_step(experience, step, *args, **kwargs)


class SKDCritic(plain_class(host.CriticModelActor)):
    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        trust.close_transformers()
        on_cpu.adapt_trainer()
        if strategy.args.train.dynamic_batch_enable:
            rebind(host, "CriticPPOTrainer", DynamicCriticTrainer)  # OpenRLHF's init names it
        super().init_model_from_pretrained(strategy, *args, **kwargs)

    def append(self, experience: Any) -> None:
        experience.info.pop(TRACE_KEY)  # the teacher has no part in the value of a state
        experience.info.pop(PROMPT_WEIGHT, None)
        super().append(experience)
