"""OpenRLHF's critic actor, which trains on OpenRLHF's tensors alone."""

from __future__ import annotations

from typing import Any

import openrlhf.trainer.ray.ppo_critic as host

from skd_plugin import trust
from skd_plugin.host import on_cpu
from skd_plugin.host.batch import TRACE_KEY
from skd_plugin.seams import plain_class


class SKDCritic(plain_class(host.CriticModelActor)):
    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        trust.close_transformers()
        on_cpu.adapt_trainer()
        super().init_model_from_pretrained(*args, **kwargs)

    def append(self, experience: Any) -> None:
        experience.info.pop(TRACE_KEY)  # the teacher has no part in the value of a state
        super().append(experience)
