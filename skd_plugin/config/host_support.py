"""What a distillation run makes of each of OpenRLHF's options. The last table of docs/options.md is made from this.
A test says that none is left out: whoever moves to another OpenRLHF decides about each option that is new.
"""

from __future__ import annotations

from typing import NamedTuple

from skd_plugin.config.host_rules import CPU_DEFAULTS, DEFAULTS, FIXED, REWARD_FREE

# Read by OpenRLHF, as in its own runs.
HONOURED = frozenset(
    """
    actor.adam.betas actor.adam.eps actor.adam.lr actor.adam.weight_decay actor.aux_loss_coef actor.dual_clip
    actor.entropy_coef actor.eps_clip actor.eps_clip_low_high actor.gradient_checkpointing_enable
    actor.gradient_checkpointing_reentrant actor.loss_agg_mode actor.lr_scheduler actor.lr_warmup_ratio actor.max_norm
    actor.min_lr_ratio actor.model_name_or_path actor.muon.lr actor.muon.momentum actor.num_gpus_per_node
    actor.num_nodes actor.optim actor.policy_loss_type
    algo.advantage.estimator algo.advantage.gamma algo.advantage.is_correction_gating
    algo.advantage.is_correction_level algo.advantage.is_correction_mode algo.advantage.is_correction_threshold
    algo.advantage.lambd algo.advantage.no_std_norm algo.dynamic_filtering_enable algo.dynamic_filtering_range
    algo.kl.estimator algo.kl.horizon algo.kl.init_coef algo.kl.target algo.kl.unbiased_gradient algo.kl.use_loss
    ckpt.best_metric_key ckpt.disable_ds ckpt.max_mem ckpt.max_num ckpt.save_hf ckpt.save_steps
    critic.adam.betas critic.adam.eps critic.adam.lr critic.adam.weight_decay critic.freezing_steps
    critic.lr_scheduler critic.lr_warmup_ratio critic.max_norm critic.min_lr_ratio critic.model_name_or_path
    critic.muon.lr critic.muon.momentum critic.num_gpus_per_node critic.num_nodes critic.optim
    critic.save_value_network critic.value_clip
    data.apply_chat_template data.dataloader_num_workers data.disable_fast_tokenizer data.input_key
    data.input_template data.label_key data.max_len data.max_samples data.prompt_dataset data.prompt_probs
    data.prompt_split
    ds.adam_offload ds.attn_implementation ds.deepcompile ds.enable_sleep ds.experts_implementation
    ds.grad_accum_dtype ds.lora.alpha ds.overlap_comm ds.packing_samples ds.use_universal_ckpt ds.value_head_prefix
    ds.zero_stage ds.zpg
    eval.dataset eval.n_samples_per_prompt eval.split eval.steps eval.temperature
    logger.logging_steps logger.wandb.group logger.wandb.key logger.wandb.org logger.wandb.project
    ref.num_gpus_per_node ref.num_nodes ref.offload
    reward.clip_range reward.model_name_or_path reward.normalize_enable reward.num_gpus_per_node reward.num_nodes
    reward.offload reward.overlong_buffer_len reward.overlong_penalty_factor reward.remote_url
    reward.stop_properly_penalty_coef
    rollout.batch_size rollout.micro_batch_size rollout.n_samples_per_prompt
    train.agent_func_path train.async_enable train.batch_size train.colocate_actor_ref train.colocate_all
    train.colocate_critic_reward train.dynamic_batch_enable train.ema_beta train.enable_ema
    train.full_determinism_enable train.max_epochs train.micro_batch_size train.num_episodes
    train.partial_rollout_enable train.seed
    vllm.enable_prefix_caching vllm.enable_sleep vllm.enforce_eager vllm.gpu_memory_utilization vllm.num_engines
    vllm.sync_backend vllm.sync_with_ray vllm.tensor_parallel_size
    """.split()
)
# Honoured, but not quite as in OpenRLHF's own runs.
OTHERWISE = {
    "ckpt.output_dir": "`model` in the run folder; another place must be empty, and a link leads to it",
    "ckpt.path": "`checkpoints` in the run folder; another place must be empty, and a link leads to it",
    "ckpt.load_enable": "the same command goes on by itself; `true`: also where the recipe has changed",
    "ds.lora.dropout": "engine and trainer are then not compared at each step: only the trainer drops",
    "ds.lora.rank": "[LoRA students](lora.md); not with a critic or a mixture of experts",
    "ds.lora.target_modules": "linear layers; not a tied output head",
    "ds.ring_attn_head_stride": "with ring attention",
    "ds.ring_attn_size": "on GPUs with `ds.packing_samples`; its attention was not run here (docs/gpus.md)",
    "ds.tensor_parallel_size": "without ZeRO-3, LoRA, the full vocabulary, a ring, a critic and others, each refused "
    "by name (docs/gpus.md); a rank has the logits of its whole micro-batch, whatever `skd.loss.chunk` says",
    "ds.use_liger_kernel": "on a GPU; not tried here",
    "logger.tensorboard_dir": "`tensorboard` in the run folder",
    "logger.wandb.run_name": "the name of the run folder",
    "rollout.max_tokens_per_gpu": "with `train.dynamic_batch_enable`; else `rollout.micro_batch_size` counts",
    "train.max_tokens_per_gpu": "with `train.dynamic_batch_enable`; else `train.micro_batch_size` counts",
    "train.async_queue_size": "with `train.async_enable`; the most updates that a token's student may be behind",
    "rollout.max_new_tokens": "`skd.rollout.max_new_tokens` goes first",
    "rollout.vllm_generate_batch_size": "only the value of `rollout.batch_size`: a step sends all its prompts at once",
}
WITHOUT_EFFECT = {
    "local_rank": "OpenRLHF sets it in each process",
    "actor.muon.nesterov": "DeepSpeed has its own value",
    "actor.muon.ns_steps": "DeepSpeed has its own value",
    "critic.muon.nesterov": "DeepSpeed has its own value",
    "critic.muon.ns_steps": "DeepSpeed has its own value",
}


def as_yaml(value: object) -> str:
    """A value as a recipe says it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class Support(NamedTuple):
    kind: str  # "honoured", "refused" or "without effect"
    words: str


TABLES = (
    {option: Support("honoured", "") for option in HONOURED},
    {option: Support("honoured", words) for option, words in OTHERWISE.items()},
    {option: Support("without effect", words) for option, words in WITHOUT_EFFECT.items()},
    {
        option: Support("refused", f"other than `{as_yaml(allowed)}`: {reason}")
        for option, (allowed, reason) in FIXED.items()
    },
)


def support_of(option: str) -> Support:
    """Raises KeyError for an option about which nothing has been decided."""
    found = [table[option] for table in TABLES if option in table]
    if len(found) != 1:
        raise KeyError(
            f"OpenRLHF's option {option} stands in {len(found)} tables of config/host_support.py, not in one"
        )
    if option in REWARD_FREE:
        return Support("honoured", "with rewards only (`skd.objective.rl_coef` above 0)")
    return found[0]


def default_of(option: str) -> str:
    """The default of a distillation run where it is not OpenRLHF's, in words; empty where it is."""
    ours = [f"`{as_yaml(DEFAULTS[option])}`"] if option in DEFAULTS else []
    on_cpu = [f"`{as_yaml(CPU_DEFAULTS[option])}` on a CPU"] if option in CPU_DEFAULTS else []
    return ", ".join(ours + on_cpu)
