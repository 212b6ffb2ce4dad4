"""The one place where names of OpenRLHF are rebound, so that its own `train_ppo_ray` builds SKD's parts.

The host's `train()` names four things: its strategy factory, its engine actor, its policy actor and its trainer.
Everything else of the host stays as it is.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from skd_plugin.compat import cpu
from skd_plugin.config.run import Run
from skd_plugin.rollout.actor import EngineSpec, SKDRollout
from skd_plugin.rollout.rule import SamplingRule
from skd_plugin.trainer.actor import SKDPolicy
from skd_plugin.trainer.controller import SKDTrainer


def bind(run: Run) -> None:
    """Raises RuntimeError if a name to be rebound is not where it is expected."""
    import openrlhf.trainer.ppo_trainer as ppo_trainer
    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    import openrlhf.trainer.ray.vllm_engine as vllm_engine
    import openrlhf.utils as host_utils

    get_strategy = host_utils.get_strategy

    def strategy_with_skd(args: Any) -> Any:
        """The first call of the host's train(): from here on `args.skd` is everywhere that the host's args are."""
        args.skd = run.skd
        if run.cpu:
            args.ds.param_dtype = "fp32"  # neither bf16 nor fp16 to the host: plain float32, 3x faster on a CPU
        return get_strategy(args)

    _rebind(host_utils, "get_strategy", strategy_with_skd)
    _rebind(vllm_engine, "RolloutRayActor", ray.remote(_rollout_class(run)))
    _rebind(ppo_actor, "PolicyModelActor", ray.remote(num_gpus=1)(SKDPolicy))
    _rebind(ppo_trainer, "PPOTrainer", ray.remote(SKDTrainer))


def _rebind(module: Any, name: str, replacement: Any) -> None:
    if not hasattr(module, name):
        raise RuntimeError(
            f"{module.__name__} has no '{name}' any more, so SKD cannot take its place (trainer/bind.py)"
        )
    setattr(module, name, replacement)


def _rollout_class(run: Run) -> type[SKDRollout]:
    """SKDRollout with the recipe in it: the host creates the actor with arguments of its own only."""
    spec = EngineSpec(
        teacher=run.skd.teacher.model_name_or_path,
        draft_len=run.skd.rollout.draft_len,
        num_teacher_entries=run.skd.loss.top_k,
        rule=SamplingRule.of(run.skd.rollout),
        seed=run.skd.rollout.seed,
        vllm_options=run.skd.vllm,
    )

    class ConfiguredRollout(SKDRollout):
        async def __init__(self, *args: Any, **kwargs: Any) -> None:
            await super().__init__(*args, skd=spec, **kwargs)

    return ConfiguredRollout


def ray_options(run: Run) -> dict[str, Any]:
    """Arguments of ray.init: the host's own environment, and what a CPU needs in every worker."""
    env = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    env = {name: value for name, value in env.items() if name not in os.environ}  # Ray refuses to be told twice
    options: dict[str, Any] = {"runtime_env": {"env_vars": env}}
    if run.cpu:
        env |= cpu.ENV
        options["runtime_env"]["worker_process_setup_hook"] = "skd_plugin.compat.cpu.install"
        # Logical: the host reserves a GPU for each actor.
        options |= {"address": "local", "num_gpus": 8, "num_cpus": 16, "include_dashboard": False}
    return options
