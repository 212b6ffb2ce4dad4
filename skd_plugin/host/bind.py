"""The one place where names of OpenRLHF are rebound, so that its own `train_ppo_ray` builds SKD's parts.

OpenRLHF's `train()` names what is rebound here: its strategy factory, its engine, policy and critic actors and its
trainer. Everything else of OpenRLHF stays as it is.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import ray

from skd_plugin import cpu, trust
from skd_plugin.config.host_options import host_defaults
from skd_plugin.config.run import Run
from skd_plugin.engine.arguments import engine_for
from skd_plugin.host import on_cpu
from skd_plugin.host.async_controller import SKDAsyncTrainer
from skd_plugin.host.controller import SKDTrainer
from skd_plugin.host.critic import SKDCritic
from skd_plugin.host.end_event import end_ids_of, join_ends_of
from skd_plugin.host.policy_actor import SKDPolicy
from skd_plugin.host.rollout_actor import SKDRollout
from skd_plugin.seams import plain_class, rebind
from skd_plugin.served.teacher import Server


def bind(run: Run) -> None:
    """Raises RuntimeError if a name to be rebound is not where it is expected."""
    import openrlhf.trainer.ppo_trainer as ppo_trainer
    import openrlhf.trainer.ppo_trainer_async as ppo_trainer_async
    import openrlhf.trainer.ray.launcher as launcher
    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    import openrlhf.trainer.ray.ppo_critic as ppo_critic
    import openrlhf.trainer.ray.vllm_engine as vllm_engine
    import openrlhf.utils as host_utils

    get_strategy = host_utils.get_strategy

    def strategy_with_skd(args: Any) -> Any:
        """The first call of OpenRLHF's train(): from here on `args.skd` is everywhere that OpenRLHF's args are."""
        args.skd = run.skd
        if run.cpu:
            args.ds.attn_implementation = run.host[
                "ds.attn_implementation"
            ]  # OpenRLHF packs for flash attention alone
        strategy = get_strategy(args)  # which takes no tensor parallelism but of bf16
        if run.cpu:
            # Neither bf16 nor fp16 to OpenRLHF: plain float32, 3x faster on a CPU.
            args.ds.param_dtype = strategy.param_dtype = "fp32"
        return strategy

    rebind(host_utils, "get_strategy", strategy_with_skd)
    rebind(vllm_engine, "RolloutRayActor", RolloutActors(run))  # create_vllm_engines names it
    rebind(ppo_actor, "PolicyModelActor", ray.remote(num_gpus=1)(SKDPolicy))
    rebind(ppo_critic, "CriticModelActor", ray.remote(num_gpus=1)(SKDCritic))
    rebind(ppo_trainer, "PPOTrainer", ray.remote(SKDTrainer))
    rebind(ppo_trainer_async, "PPOTrainerAsync", ray.remote(SKDAsyncTrainer))
    for name in ("ReferenceModelActor", "RewardModelActor"):
        frozen = _frozen(getattr(launcher, name), has_logits=name == "ReferenceModelActor")
        rebind(launcher, name, ray.remote(num_gpus=1)(frozen))


def _frozen(host_actor: Any, *, has_logits: bool = False) -> type:
    """OpenRLHF's actor of a frozen model, without code of the model's, and in float32 on a CPU.

    Args:
        has_logits: the policy is held to the model's, so that what is one event to the policy is one to it.
    """

    class Frozen(plain_class(host_actor)):
        def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            trust.close_transformers()
            on_cpu.adapt_trainer()
            super().init_model_from_pretrained(strategy, *args, **kwargs)
            if has_logits and (end_ids := end_ids_of(strategy.args)):
                join_ends_of(self.model.model, end_ids)

    return Frozen


class RolloutActors:
    """In the place of OpenRLHF's actor class, whose `options` its `create_vllm_engines` asks for once an engine, in
    their order: each engine's class has its own teacher in it.
    """

    def __init__(self, run: Run) -> None:
        number = {**host_defaults(), **run.host}["vllm.num_engines"]
        self._classes = iter([rollout_class(run, name) for name in run.skd.teachers_of_engines(number)])

    def options(self, **options: Any) -> Any:
        return ray.remote(next(self._classes)).options(**options)


def rollout_class(run: Run, teacher: str) -> type[SKDRollout]:
    """SKDRollout with the recipe in it: `create_vllm_engines` creates the actor with OpenRLHF's arguments only.

    Args:
        teacher: its name.
    """
    options, skd = {**host_defaults(), **run.host}, run.skd.of_teacher(teacher)
    spec = engine_for(skd, options, student=options["actor.model_name_or_path"], cpu=run.cpu)
    spec = replace(spec, teacher_moves=skd.the_teacher.follow is not None)
    reward_timeout_s, place = run.skd.objective.reward_timeout_s, list(run.skd.all_teachers).index(teacher)
    server = Server.of(skd.the_teacher, skd.loss.teacher_top_k) if skd.is_served else None

    class ConfiguredRollout(SKDRollout):
        async def __init__(self, *args: Any, **kwargs: Any) -> None:
            known = {"spec": spec, "reward_timeout_s": reward_timeout_s, "teacher": place, "server": server}
            await super().__init__(*args, **known, **kwargs)

    return ConfiguredRollout


def ray_options(run: Run, *, own_ray: bool) -> dict[str, Any]:
    """Arguments of ray.init: OpenRLHF's own environment, and what a CPU needs in every worker."""
    env = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    env = {name: value for name, value in env.items() if name not in os.environ}  # Ray refuses to be told twice
    env[trust.REMOTE_CODE] = os.environ.get(trust.REMOTE_CODE, "0")
    options: dict[str, Any] = {"runtime_env": {"env_vars": env}}
    if run.cpu:
        env |= cpu.environment()
        options["runtime_env"]["worker_process_setup_hook"] = "skd_plugin.host.on_cpu.install"
        options |= {"num_gpus": cpu.LOGICAL_GPUS, "num_cpus": 16, "include_dashboard": False}
    if own_ray:
        options["address"] = "local"
    return options
