"""Every name, signature and habit of OpenRLHF 0.11.2 that the plugin leans on. A failure names our file to revisit."""

from __future__ import annotations

import argparse
import ast
import asyncio
import dataclasses
import importlib
import inspect
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import deepspeed
import pytest
import torch

from skd_plugin.config import host_rules
from skd_plugin.config.host_options import HOST_MODULE, host_arguments, host_parser
from skd_plugin.core.trace import Trace
from tests.contract.source import assert_parameters, assert_unchanged, attributes_set, imports_inside, tree_of
from tests.traces import trace_of

HOST = "OpenRLHF 0.11.2"


def find(path: str) -> Any:
    """`package.module:Name.attribute`; the class behind a Ray actor stands for it, as it does in our code."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split(".") if names else ():
        found = getattr(found, name)
        if hasattr(found, "__ray_metadata__"):
            found = found.__ray_metadata__.modified_class.__bases__[0]
    return found


PPO = "openrlhf.trainer.ppo_trainer"
ACTOR = "openrlhf.trainer.ray.ppo_actor"
ENGINE = "openrlhf.trainer.ray.vllm_engine"
ASYNC = "openrlhf.trainer.ppo_trainer_async"
SAMPLES = "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
WRAP = "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap"
CRITIC = "openrlhf.trainer.ray.ppo_critic:CriticModelActor"
LAUNCHER = "openrlhf.trainer.ray.launcher"
EXPERIENCE = "openrlhf.trainer.ppo_utils.experience"

HASHES = [  # host code, hash, our file, what we assume of it
    (f"{ACTOR}:ActorPPOTrainer.training_step", "9c6de117fd80", "host/policy_actor.py and host/objective.py",
     "it calls the actor with return_output, hands actor_loss_fn masks and totals by keyword, unpacks five results, "
     "and makes a metric of everything in info"),
    (f"{ACTOR}:ActorPPOTrainer.ppo_train", "91d18c4b07d9", "host/policy_actor.py",
     "it draws batches from the replay buffer and passes one normalisation for a whole optimizer step"),
    (f"{ACTOR}:ActorPPOTrainer.broadcast_to_vllm", "9f4eee15d4b0", "host/weight_sync.py",
     "our broadcast takes its place and must do whatever else it does"),
    (f"{ACTOR}:ActorPPOTrainer._init_vllm_sync_group", "07d8ac18ba1f", "host/policy_actor.py",
     "it makes the group through which our buckets travel, says who has which rank, and waits for the engines in it"),
    (f"{ACTOR}:PolicyModelActor.init_model_from_pretrained", "d17c9b944d6e", "host/policy_actor.py",
     "it names ActorPPOTrainer and gives it the prepared actor, whose forward our hook listens to"),
    ("openrlhf.models.loss:aggregate_loss", "daf538678b29", "host/objective.py",
     "it turns our token values into the loss"),
    ("openrlhf.models:Actor.forward", "43bd58c109a6", "host/objective.py",
     "it returns unshifted float32 logits beside the log-probs when return_output is set"),
    ("openrlhf.utils.loss_utils:iter_grad_accum_global_norm", "cd9b41d68351", "host/batch.py",
     "it gives the token count of the whole optimizer step"),
    ("openrlhf.utils.loss_utils:_optimizer_step_loss_norm", "834364231837", "host/batch.py",
     "it gives the token count of the whole optimizer step"),
    ("openrlhf.utils.loss_utils:_get_dp_group", "2849f5a64713", "host/batch.py",
     "it gives the ranks over which totals are"),
    ("openrlhf.utils.loss_utils:get_loss_batch_info", "8b7047698cc3", "host/batch.py",
     "with dynamic batches it takes the totals from the replay buffer"),
    ("openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer", "2fb773b70f71", "host/batch.py",
     "its dynamic items are lists of samples, of which it makes one micro-batch, and it says which ends a step"),
    ("openrlhf.trainer.ray.ppo_critic:CriticPPOTrainer.training_step", "4016d2217a1f", "host/critic.py",
     "it steps where the replay buffer says so, without telling DeepSpeed"),
    ("openrlhf.models.ring_attn_utils:unpad_and_slice_tensor", "f26aeb272274", "host/batch.py",
     "the packed row holds the tokens of the attention mask, row by row, and positions start anew in each sequence"),
    ("openrlhf.models.ring_attn_utils:gather_and_pad_tensor", "a28afec045e5",
     "host/on_cpu.py and host/chunked_actor.py", "it joins the ranks' rows by all_gather, and pads by pad_input"),
    ("openrlhf.models.ring_attn_utils:get_tensor_in_current_ring_attn_rank", "4ef5e79e2e50", "host/chunked_actor.py",
     "rank r of a ring has places r S to (r + 1) S of the packed tokens, padded at their end"),
    ("openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy.setup_ring_attn", "9b54b8384afc",
     "host/chunked_actor.py", "it substitutes transformers' attention by ring_flash_attn's"),
    (f"{EXPERIENCE}:balance_experiences", "9e24862c1af3", "host/batch.py",
     "it splits and joins samples, traces with them"),
    (f"{PPO}:PPOTrainer.fit", "fc2b371660c4", "host/controller.py",
     "it calls generate_samples, train_step, save_logs_and_checkpoints and evaluate, in this order, with these keys"),
    (f"{PPO}:PPOTrainer.evaluate", "977859287716", "host/controller.py", "our evaluate takes its place"),
    (f"{PPO}:BasePPOTrainer.train_step", "5e0be4a5b50f", "host/training_side.py",
     "it needs info['reward'] and reports timing/broadcast"),
    (f"{PPO}:BasePPOTrainer.ppo_train", "87f25d28dee3", "host/training_side.py",
     "its status joins what the actors' fit returns, our seconds among it"),
    (f"{ACTOR}:PolicyModelActor.fit", "4018c749cbf9", "host/policy_actor.py", "it returns the status of the update"),
    (f"{PPO}:BasePPOTrainer.save_logs_and_checkpoints", "1bbbe775e8cb", "host/training_side.py",
     "we extend what it logs"),
    (f"{PPO}:BasePPOTrainer.save_best_checkpoint", "4557b701d488", "host/training_side.py",
     "we add to the states that it saves"),
    (f"{ASYNC}:PPOTrainerAsync.__init__", "63c21abac8f9", "host/async_controller.py",
     "it names the two actors, and makes as many slots as the queue has places: no token is older"),
    (f"{ASYNC}:PPOTrainerAsync.fit", "e70cb7a23364", "host/async_controller.py",
     "it reads the checkpoint's states, sends the student and runs both actors to their ends"),
    (f"{ASYNC}:GenerateSamplesActor.fit", "f9c6d1422e6c", "host/async_controller.py",
     "it takes a slot a batch, evaluates under the lock, and puts samples and client states into the queue"),
    (f"{ASYNC}:GenerateSamplesActor._run_eval", "674d3ee92589", "host/async_controller.py", "ours takes its place"),
    (f"{ASYNC}:TrainingActor.fit", "1d6135be4b6e", "host/async_controller.py",
     "it tells evaluations from batches in the queue, gives the slot back before the step, and times the whole step"),
    (f"{ASYNC}:TrainingActor.broadcast_to_vllm", "249d97cea9e2", "host/async_controller.py",
     "it waits for the lock, and with partial rollouts pauses the engines"),
    (f"{PPO}:BasePPOTrainer._compute_rollout_stats", "6d5005661700", "host/samples.py",
     "it averages info['reward'], which is NaN in a reward-free run, under rollout/reward_mean"),
    (f"{PPO}:prepare_datasets", "1428fd249561", "prepare/load_run.py and host/controller.py",
     "we load what it loads, with the same options, before the start, and it names PromptDataset"),
    ("openrlhf.datasets.utils:blending_datasets", "d5017d43e403", "prepare/rows.py",
     "it tells files by their endings, cuts names at commas and @, and never ends where a probability is 0"),
    ("openrlhf.datasets.prompts_dataset:preprocess_data", "a7cfdd9cd208", "host/prompts.py",
     "it makes the prompt of a text or of messages, and takes <image> in them for an image"),
    (f"{PPO}:compute_eval_metrics", "55f51d9155c7", "host/evaluation.py", "our evaluation reports its numbers"),
    (f"{ENGINE}:RolloutRayActor.__init__", "6d6ba55dbca3", "host/rollout_actor.py",
     "we replace some of its engine arguments"),
    (f"{ENGINE}:RolloutRayActor.generate", "be598fd6e7bb", "host/rollout_actor.py", "we wrap one call of it"),
    (f"{ENGINE}:RolloutRayActor.generate_responses", "7a789a81407e", "host/rollout_actor.py",
     "it passes itself to the executor as llm_engine, by keyword"),
    (f"{ENGINE}:create_vllm_engines", "b726612bc09e", "host/rollout_actor.py and host/bind.py",
     "it makes the engines' arguments"),
    (f"{SAMPLES}._process_response_into_experience", "a9ebfa27f6d5", "host/samples.py",
     "we add the trace to its result"),
    (f"{SAMPLES}._dispatch_prompts_to_vllm", "2c865ad5e5ce", "host/samples.py",
     "of an engine it calls generate_responses and get_num_unfinished_requests alone (host/asked.py), it makes the "
     "sampling parameters that the rule overrules, and reads self.tokenizer for the engines alone"),
    (f"{MAKER}.make_experience_batch", "9e1bcdcf7db3", "host/samples.py",
     "ours takes its place without any model's forward"),
    (f"{MAKER}.split_rollout_samples", "19bd2be8db3b", "host/samples.py",
     "it is all that we keep of the experience maker"),
    (f"{WRAP}.init_process_group", "d74cebdbc3d5", "host/weight_sync.py",
     "it leaves the group where our broadcast finds it"),
    (f"{WRAP}.update_weight_cuda_ipc", "7cc3a28531fd", "host/weight_sync.py", "we open IPC handles the way it does"),
    ("openrlhf.utils.utils:get_strategy", "ad7d0015546e", "host/bind.py", "we wrap it to put args.skd in place"),
    ("openrlhf.utils.agent:SingleTurnAgentExecutor.execute", "696bec43943c",
     "host/turns.py and host/rewards.py",
     "it generates once, keeps the engine's token ids, and asks for one score where it has somebody to ask"),
    ("openrlhf.utils.agent:MultiTurnAgentExecutor.execute", "72618d9f386e", "host/turns.py",
     "every turn's tokens are the response's action ranges, in order"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "expected", "ours", "because"), HASHES, ids=[row[0].partition(":")[2] for row in HASHES]
)
def test_source_is_the_one_that_was_read(path: str, expected: str, ours: str, because: str) -> None:
    assert_unchanged(find(path), expected, HOST, ours, because)


SIGNATURES = [
    (f"{ACTOR}:ActorPPOTrainer.__init__",
     "strategy actor ema_model actor_optim actor_scheduler ema_beta micro_train_batch_size buffer_limit "
     "buffer_cpu_offload eps_clip tokenizer dataloader_pin_memory vllm_engines **", "host/policy_actor.py"),
    (f"{ACTOR}:ActorPPOTrainer.training_step", "experience kl_ctl step loss_batch_info", "host/policy_actor.py"),
    (f"{ACTOR}:ActorPPOTrainer.broadcast_to_vllm", "", "host/policy_actor.py"),
    (f"{ACTOR}:ActorPPOTrainer._init_vllm_sync_group", "backend", "host/policy_actor.py"),
    (f"{ACTOR}:PolicyModelActor.init_model_from_pretrained", "strategy pretrain max_steps vllm_engines",
     "host/policy_actor.py"),
    (f"{ACTOR}:PolicyModelActor.append", "experience", "host/policy_actor.py"),
    ("openrlhf.trainer.ray.utils:get_physical_gpu_id", "", "host/weight_sync.py"),
    ("openrlhf.utils.distributed_util:torch_dist_barrier_and_cuda_sync", "", "host/weight_sync.py"),
    ("openrlhf.utils.distributed_util:stateless_init_process_group",
     "master_address master_port rank world_size device", "engine/gloo.py"),
    ("openrlhf.models.loss:aggregate_loss",
     "loss loss_mask token_level_loss dp_size batch_num_tokens global_batch_size", "host/objective.py"),
    (f"{PPO}:PPOTrainer.__init__",
     "pretrain strategy actor_model_group critic_model_group reward_model_group reference_model_group vllm_engines **",
     "host/controller.py"),
    (f"{ASYNC}:PPOTrainerAsync.__init__",
     "pretrain strategy actor_model_group critic_model_group reward_model_group reference_model_group vllm_engines **",
     "host/async_controller.py"),
    (f"{ASYNC}:GenerateSamplesActor.__init__",
     "pretrain strategy vllm_engines vllm_lock rollout_queue rollout_slots **", "host/async_controller.py"),
    (f"{ASYNC}:TrainingActor.__init__",
     "pretrain strategy actor_model_group critic_model_group reward_model_group reference_model_group vllm_engines "
     "vllm_lock rollout_queue rollout_slots", "host/async_controller.py"),
    (f"{ASYNC}:PPOTrainerAsync.fit", "", "host/async_controller.py"),
    (f"{ASYNC}:GenerateSamplesActor._run_eval", "", "host/async_controller.py"),
    (f"{ASYNC}:TrainingActor.broadcast_to_vllm", "", "host/async_controller.py"),
    (f"{PPO}:BasePPOTrainer.train_step", "rollout_samples global_step", "host/async_controller.py"),
    ("openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer.__init__",
     "sample_batch_size limit cpu_offload packing_samples dynamic_batch", "host/batch.py"),
    ("openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer.__getitem__", "idx", "host/batch.py"),
    ("openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer.collate_fn", "batch", "host/batch.py"),
    ("openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer.setup_dynamic_batch", "strategy", "host/batch.py"),
    ("openrlhf.trainer.ray.ppo_critic:CriticPPOTrainer.training_step", "experience step loss_batch_info",
     "host/critic.py"),
    (f"{ACTOR}:PolicyModelActor.fit", "kl_ctl", "host/policy_actor.py"),
    (f"{ASYNC}:TrainingActor.fit", "global_step", "host/async_controller.py"),
    (f"{ACTOR}:PolicyModelActor.save_checkpoint", "tag client_states metric_value metric_key",
     "host/policy_actor.py"),
    (f"{PPO}:PPOTrainer.fit", "global_step", "host/controller.py"),
    (f"{PPO}:PPOTrainer.train_step", "rollout_samples global_step", "host/controller.py"),
    (f"{PPO}:PPOTrainer.save_logs_and_checkpoints", "global_step logs_dict client_states",
     "host/training_side.py"),
    (f"{PPO}:BasePPOTrainer.save_best_checkpoint", "eval_metrics global_step client_states",
     "host/training_side.py"),
    (f"{PPO}:PPOTrainer.evaluate", "global_step **", "host/controller.py"),
    (f"{PPO}:compute_eval_metrics", "eval_dataloader samples_list n_samples_per_prompt", "host/evaluation.py"),
    ("openrlhf.utils.logging_utils:WandbLogger.log_eval", "global_step logs_dict", "host/training_side.py"),
    ("openrlhf.utils.logging_utils:TensorboardLogger.log_eval", "global_step logs_dict", "host/training_side.py"),
    ("openrlhf.utils.logging_utils:WandbLogger.close", "", "host/training_side.py"),
    ("openrlhf.utils.logging_utils:TensorboardLogger.close", "", "host/training_side.py"),
    (f"{LAUNCHER}:RayActorGroup.async_run_method", "method_name * **", "host/training_side.py"),
    (f"{SAMPLES}.__init__", "strategy prompts_dataloader eval_dataloader tokenizer vllm_engines",
     "host/samples.py"),
    (f"{SAMPLES}.generate_samples", "**", "host/samples.py"),
    (f"{SAMPLES}.generate_eval_samples", "**", "host/samples.py and host/evaluation.py"),
    (f"{SAMPLES}._dispatch_prompts_to_vllm", "prompts labels images **", "host/samples.py"),
    (f"{SAMPLES}._generate_vllm", "dataloader_iter num_prompts dynamic_filtering **", "host/samples.py"),
    (f"{SAMPLES}._process_response_into_experience", "response **", "host/samples.py"),
    (f"{ENGINE}:batch_vllm_engine_call", "engines method_name * rank_0_only **", "host/samples.py"),
    (f"{MAKER}.__init__",
     "actor_model_group critic_model_group reward_model_group initial_model_group kl_controller strategy tokenizer **",
     "host/training_side.py"),
    (f"{MAKER}.make_experience_batch", "rollout_samples", "host/samples.py"),
    (f"{MAKER}.compute_advantages_and_returns", "experiences", "host/samples.py"),
    (f"{MAKER}.split_rollout_samples", "rollout_samples", "host/samples.py"),
    (f"{ENGINE}:RolloutRayActor.__init__",
     "* bundle_indices agent_func_path remote_rm_url mm_pad_token_ids **", "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.generate", "prompt_token_ids sampling_params multi_modal_data",
     "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.generate_responses",
     "prompt label sampling_params max_length hf_tokenizer num_samples images", "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.init_process_group",
     "master_address master_port rank_offset world_size group_name backend use_ray", "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.reset_prefix_cache", "", "host/weight_sync.py"),
    (f"{ENGINE}:RolloutRayActor.sleep", "level", "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.wake_up", "tags", "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.pause_generation", "", "host/rollout_actor.py"),
    (f"{ENGINE}:RolloutRayActor.resume_generation", "", "host/rollout_actor.py"),
    ("openrlhf.utils.agent:AgentExecutorBase.execute",
     "prompt label sampling_params max_length hf_tokenizer llm_engine images", "host/turns.py"),
    (f"{WRAP}.init_process_group",
     "master_address master_port rank_offset world_size group_name backend use_ray", "host/weight_sync.py"),
    (f"{WRAP}.update_weight", "name dtype shape empty_cache", "host/weight_sync.py"),
    (f"{WRAP}.update_weight_cuda_ipc", "name dtype shape ipc_handles empty_cache", "host/weight_sync.py"),
    ("openrlhf.models:Actor.__init__",
     "pretrain_or_model attn_implementation param_dtype load_in_4bit lora_rank lora_alpha lora_dropout target_modules "
     "ds_config device_map packing_samples temperature use_liger_kernel freeze_visual_encoder experts_implementation "
     "**", "host/chunked_actor.py"),
    ("openrlhf.models:Actor.forward",
     "sequences action_mask attention_mask return_output allgather_logits return_logprobs ring_attn_group "
     "packed_seq_lens return_entropy **", "host/chunked_actor.py"),
    (f"{CRITIC}.init_model_from_pretrained", "strategy pretrain max_steps", "host/critic.py"),
    (f"{CRITIC}.append", "experience", "host/critic.py"),
    (f"{LAUNCHER}:ReferenceModelActor.init_model_from_pretrained", "strategy pretrain", "host/bind.py"),
    (f"{LAUNCHER}:RewardModelActor.init_model_from_pretrained", "strategy pretrain", "host/bind.py"),
    ("openrlhf.datasets.prompts_dataset:preprocess_data",
     "data input_template input_key label_key apply_chat_template", "host/prompts.py"),
    ("openrlhf.datasets.prompts_dataset:PromptDataset.__init__", "dataset tokenizer strategy input_template",
     "host/run_prompts.py"),
    ("openrlhf.utils:get_strategy", "args", "host/bind.py"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "names", "ours"), SIGNATURES, ids=[row[0].partition(":")[2] for row in SIGNATURES])
def test_signature(path: str, names: str, ours: str) -> None:
    assert_parameters(find(path), names.split(), f"skd_plugin/{ours}")


ATTRIBUTES = [
    ((f"{ACTOR}:ActorPPOTrainer.__init__",),
     "strategy args actor actor_loss_fn", "host/policy_actor.py"),
    ((f"{ACTOR}:ActorPPOTrainer.__init__",), "strategy actor vllm_engines use_cuda_ipc", "host/weight_sync.py"),
    ((f"{ACTOR}:ActorPPOTrainer._init_vllm_sync_group",), "_model_update_group", "host/weight_sync.py"),
    ((f"{ACTOR}:PolicyModelActor.init_model_from_pretrained",), "trainer actor", "host/policy_actor.py"),
    ((f"{PPO}:PPOTrainer.__init__", f"{PPO}:BasePPOTrainer.__init__"),
     "strategy args actor_model_group critic_model_group reward_model_group reference_model_group vllm_engines "
     "tokenizer kl_ctl experience_maker wandb_logger tensorboard_logger", "host/training_side.py"),
    ((f"{PPO}:PPOTrainer.__init__",), "samples_generator generate_kwargs", "host/controller.py"),
    ((f"{SAMPLES}.__init__",), "args eval_dataloader", "host/evaluation.py"),
    ((f"{ASYNC}:GenerateSamplesActor.__init__",), "samples_generator generate_kwargs", "host/async_controller.py"),
    ((f"{ASYNC}:PPOTrainerAsync.__init__",), "generator_actor trainer_actor", "host/async_controller.py"),
    (("openrlhf.datasets.prompts_dataset:PromptDataset.__init__",), "prompts datasources", "host/by_task.py"),
    (("openrlhf.datasets.prompts_dataset:PromptDataset.__init__",), "prompts labels images datasources",
     "host/run_prompts.py"),
    ((f"{SAMPLES}.__init__",), "vllm_engines", "host/samples.py"),
    ((f"{ENGINE}:RolloutRayActor.__init__",), "llm executor", "host/rollout_actor.py"),
    ((f"{WRAP}.init_process_group",), "_model_update_with_ray _model_update_group", "host/weight_sync.py"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "names", "ours"), ATTRIBUTES, ids=[row[0][0].partition(":")[2] for row in ATTRIBUTES]
)
def test_attributes_that_we_use_are_set(paths: tuple[str, ...], names: str, ours: str) -> None:
    missing = set(names.split()) - attributes_set(*map(find, paths))
    assert not missing, f"{paths[0]} sets no {', '.join(sorted(missing))} any more; revisit skd_plugin/{ours}"


# --- Ray classes and rebound names (host/bind.py) ---


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        ("skd_plugin.host.rollout_actor:HostRollout", "RolloutRayActor"),
        ("skd_plugin.host.policy_actor:HostPolicy", "PolicyModelActor"),
        ("skd_plugin.host.controller:HostTrainer", "PPOTrainer"),
    ],
)
def test_plain_class_behind_the_ray_actor(ours: str, name: str) -> None:
    """One base below Ray's thin subclass is the host's own class; another Ray could put two there."""
    module, _, attribute = ours.partition(":")
    plain = getattr(importlib.import_module(module), attribute)
    assert plain.__name__ == name and plain.__module__.startswith("openrlhf"), f"found {plain}; revisit {module}"
    assert "__ray_call__" not in vars(plain), f"Ray's wrapper is still around {name}; revisit {module}"


@pytest.mark.parametrize(
    "path",
    [f"{ACTOR}:PolicyModelActor", CRITIC, f"{LAUNCHER}:ReferenceModelActor", f"{LAUNCHER}:RewardModelActor"],
)
def test_a_model_asks_for_one_gpu(path: str) -> None:
    module, _, name = path.partition(":")
    options = getattr(importlib.import_module(module), name)._default_options
    assert options.get("num_gpus") == 1 and len(options) <= 2, f"{options}; repeat them in skd_plugin/host/bind.py"


@pytest.mark.parametrize(("module", "name"), [(ENGINE, "RolloutRayActor"), (PPO, "PPOTrainer")])
def test_other_actors_are_decorated_without_options(module: str, name: str) -> None:
    options = getattr(importlib.import_module(module), name)._default_options
    assert not {key for key, value in options.items() if value}, f"{options}; repeat them in skd_plugin/host/bind.py"


def test_script_builds_the_classes_that_it_imports() -> None:
    train = ast.unparse(tree_of(importlib.import_module(HOST_MODULE).train))
    for use in (
        "get_strategy(args)",
        "PPOTrainer.remote(",
        "PolicyModelActor, pg=pg",
        "CriticModelActor, pg=pg",
        "ReferenceModelActor, pg=pg",
        "RewardModelActor, pg=pg",
        "create_vllm_engines(",
    ):
        assert use in train, f"train() has no '{use}' any more; revisit skd_plugin/host/bind.py"


class _Reached(Exception):
    """Carries what the host had when it came to the place under test."""


def _run_host(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [HOST_MODULE, *argv])
    monkeypatch.delitem(sys.modules, HOST_MODULE, raising=False)
    runpy.run_module(HOST_MODULE, run_name="__main__")


@pytest.fixture
def host_args(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`host_args(options)`: the args with which the host's train() calls get_strategy, the first thing it does."""
    import openrlhf.utils
    import ray

    def reached(args: Any) -> None:
        raise _Reached(args)

    def get(options: dict[str, Any]) -> SimpleNamespace:
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(openrlhf.utils, "get_strategy", reached)
        complete = host_rules.complete(options, cpu=True)
        with pytest.raises(_Reached) as caught:
            _run_host(host_arguments(complete, host_parser()), monkeypatch)
        return caught.value.args[0]

    return get


MINIMAL = {
    "actor": {"model_name_or_path": "student"},
    "data": {"prompt_dataset": "prompts.jsonl"},
    "reward": {"remote_url": host_rules.NO_REWARD},
}


def test_host_accepts_a_reward_free_recipe(host_args: Any) -> None:
    """train() reaches get_strategy, where bind() hooks in, and starts no reference model, critic or reward model."""
    args = host_args(MINIMAL)
    assert args.actor.model_name_or_path == "student"
    assert args.algo.kl.init_coef == 0, "a reference model would be started; revisit skd_plugin/config/host_rules.py"
    assert args.critic.model_name_or_path is None, "a critic would be started; revisit config/host_rules.py"
    assert args.reward.remote_url == [host_rules.NO_REWARD], "revisit skd_plugin/host/rollout_actor.py, remote_rm_url"


def test_strategy_keeps_the_args_that_carry_our_recipe() -> None:
    """args.skd, put there by bind(), must be strategy.args.skd in every actor."""
    from openrlhf.utils import get_strategy

    args = SimpleNamespace(
        train=SimpleNamespace(seed=1, micro_batch_size=1, batch_size=1),
        ds=SimpleNamespace(
            zero_stage=0, param_dtype="bf16", adam_offload=False, zpg=1, use_universal_ckpt=False, overlap_comm=False,
            grad_accum_dtype=None, deepcompile=False, ring_attn_size=1, tensor_parallel_size=1,
        ),
    )  # fmt: skip
    assert get_strategy(args).args is args, "revisit skd_plugin/host/bind.py, strategy_with_skd"


# --- engine actor (host/rollout_actor.py) ---


def _engine_keywords() -> set[str]:
    tree = tree_of(find(f"{ENGINE}:create_vllm_engines"))
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = {key.value for node in dicts for key in node.keys if isinstance(key, ast.Constant)}
    stores = [n.slice.value for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)
              and isinstance(n.slice, ast.Constant)]  # fmt: skip
    return (keys | set(stores)) - {"GPU", "CPU", "image"}


def test_engine_gets_the_arguments_that_we_replace() -> None:
    """SKDRollout pops these; one that the host renames would go to vLLM beside ours."""
    replaced = {"model", "max_model_len", "worker_extension_cls", "dtype", "logprobs_mode", "max_logprobs",
                "gpu_memory_utilization", "remote_rm_url"}  # fmt: skip
    missing = replaced - _engine_keywords()
    assert not missing, f"the host no longer passes {missing}; revisit skd_plugin/host/rollout_actor.py"


def test_every_argument_of_the_engine_has_a_taker() -> None:
    """What is neither ours nor the host actor's own goes to vLLM's EngineArgs."""
    import vllm

    own = {"num_gpus", "full_determinism", "bundle_indices", "agent_func_path", "remote_rm_url", "mm_pad_token_ids"}
    unknown = _engine_keywords() - own - {f.name for f in dataclasses.fields(vllm.AsyncEngineArgs)}
    assert not unknown, f"new engine arguments {unknown}; revisit skd_plugin/host/rollout_actor.py"


@pytest.mark.parametrize("name", ["__init__", "generate", "reset_prefix_cache", "init_process_group"])
def test_engine_actor_is_asynchronous(name: str) -> None:
    assert inspect.iscoroutinefunction(getattr(find(f"{ENGINE}:RolloutRayActor"), name)), (
        "revisit host/rollout_actor.py"
    )


class _Tokenizer:
    """Ids are the characters' code points."""

    eos_token = "\n"
    pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(char) for char in text]])}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids)


def make_trace(ids: list[int]) -> Trace:
    return trace_of(torch.tensor(ids, dtype=torch.int32))


class _Engine:
    """Answers with the given texts, one a call, as SKDRollout.generate does."""

    teacher_top_k = 1

    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)
        self.prompts: list[list[int]] = []
        self.references: list[str | None] = []
        self.paired: list[str] = []

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling_params: Any,
        multi_modal_data: Any = None,
        *,
        reference: str | None = None,
        prompt: str = "",
        **_: Any,
    ) -> Any:
        self.paired.append(prompt)
        self.prompts.append(list(prompt_token_ids))
        self.references.append(reference)
        text = self._texts.pop(0)
        ids = [ord(char) for char in text]
        completion = SimpleNamespace(token_ids=ids, text=text, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[completion], skd_trace=make_trace(ids))


def _execute(executor: Any, engine: _Engine, prompt: str, label: str = "") -> dict[str, Any]:
    from vllm import SamplingParams

    from skd_plugin.host.asked import AskedSample, SampledBy
    from skd_plugin.host.turns import TracingExecutor
    from tests.rules import make_rule

    sample = AskedSample(prompt, SampledBy(make_rule(top_k=1), seed=0))
    call = TracingExecutor(executor).execute(
        prompt=sample, label=label, sampling_params=SamplingParams(max_tokens=8), max_length=64,
        hf_tokenizer=_Tokenizer(), llm_engine=engine, images=None,
    )  # fmt: skip
    return asyncio.run(call)


def _action_ids(response: dict[str, Any]) -> list[int]:
    return [i for start, end in response["action_ranges"] for i in response["observation_tokens"][start:end]]


def test_engine_is_given_the_reference_of_the_label() -> None:
    """The host hands the label to its executor by name, and the executor asks the engine once."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    engine = _Engine("xyz")
    _execute(SingleTurnAgentExecutor(None), engine, "ab", label='{"reference": "the text"}')
    assert engine.references == ["the text"], "revisit TracingExecutor in skd_plugin/host/turns.py"


def test_a_pair_of_prompts_goes_through_the_hosts_executor_and_back() -> None:
    """Through its data loader, Ray's pickles and its executor, which gets a plain text and gives back the prompt."""
    import pickle

    from openrlhf.trainer.ppo_utils.samples_generator import _collect_prompt_batch
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from skd_plugin.host.teacher_prompts import PairedPrompt, teacher_of, teacher_prompt

    batches = iter([(["default"], [PairedPrompt("ab", "what the teacher reads", "math")], [""], [None])])
    (sent,), *_ = _collect_prompt_batch(batches, 1)
    arrived = pickle.loads(pickle.dumps(sent))
    assert (arrived, teacher_prompt(arrived), teacher_of(arrived)) == ("ab", "what the teacher reads", "math")
    engine = _Engine("xyz")
    response = _execute(SingleTurnAgentExecutor(None), engine, arrived)
    ours = "revisit PairedPrompt in skd_plugin/host/teacher_prompts.py"
    assert engine.paired == [arrived] and teacher_prompt(engine.paired[0]) == "what the teacher reads", ours
    assert (teacher_prompt(response["prompt"]), teacher_of(response["prompt"])) == (
        "what the teacher reads",
        "math",
    ), ours
    _execute(SingleTurnAgentExecutor(None), engine := _Engine("xyz"), "ab")
    assert [teacher_prompt(prompt) for prompt in engine.paired] == [None], ours


def test_an_engine_sleeps_at_the_level_that_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host sleeps without naming a level; at 2 the teacher would be lost."""
    from skd_plugin.host.rollout_actor import HostRollout, SKDRollout

    assert inspect.signature(HostRollout.sleep).parameters["level"].default == 1
    slept: list[int] = []

    async def sleep(self: Any, level: int) -> None:
        slept.append(level)

    monkeypatch.setattr(HostRollout, "sleep", sleep)
    engine = object.__new__(SKDRollout)
    engine.llm = None  # asked when a call takes long
    asyncio.run(engine.sleep())
    with pytest.raises(ValueError, match="at level 2, at which its teacher would be lost"):
        asyncio.run(engine.sleep(level=2))
    assert slept == [1]


def test_single_turn_executor_keeps_the_engines_ids() -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    response = _execute(SingleTurnAgentExecutor(None), _Engine("xyz"), "ab")
    assert response["observation_tokens"] == [ord(char) for char in "abxyz"]
    assert response["skd"].response_ids.tolist() == _action_ids(response), "revisit skd_plugin/host/rollout_actor.py"
    assert response["reward"] is None


def test_multi_turn_executor_keeps_the_engines_ids() -> None:
    """The traces of all turns, joined, are the tokens of all action ranges; feedback has no trace."""
    from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

    class Twice(AgentInstanceBase):
        def __init__(self) -> None:
            self.turn = 0

        async def step(self, states: dict, **_: Any) -> dict[str, Any]:
            self.turn += 1
            feedback = {"environment_feedback": "--", "done": self.turn == 2}
            return {"rewards": torch.tensor(0.5), "scores": torch.tensor(0.5), **feedback}

    engine = _Engine("xyz", "vw")
    response = _execute(MultiTurnAgentExecutor(Twice), engine, "ab")
    assert "".join(map(chr, engine.prompts[1])) == "abxyz--"
    assert len(response["action_ranges"]) == 2
    assert response["skd"].response_ids.tolist() == _action_ids(response), "revisit skd_plugin/host/rollout_actor.py"


# --- policy actor (host/policy_actor.py) ---


def test_engines_are_asked_before_the_group_that_would_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has not started answers with its error; in the group's rendezvous it would say nothing."""
    import openrlhf.trainer.ray.ppo_actor as host

    from skd_plugin.host import policy_actor

    calls: list[str] = []

    def get(refs: list[str]) -> None:
        calls.extend(refs)
        raise RuntimeError("no memory for the cache")

    engine = SimpleNamespace(describe_skd=SimpleNamespace(remote=lambda: "asked"))
    monkeypatch.setattr(policy_actor.ray, "get", get)
    monkeypatch.setattr(host.ActorPPOTrainer, "_init_vllm_sync_group", lambda self, backend: calls.append("waits"))
    trainer = object.__new__(policy_actor.SKDActorTrainer)
    trainer.vllm_engines = [engine, engine]
    with pytest.raises(RuntimeError, match="no memory"):
        trainer._init_vllm_sync_group("gloo")
    assert calls == ["asked", "asked"]


# --- experience (host/samples.py) ---


class _AlwaysTheSame:
    """A plan of rules that has one."""

    def __init__(self, rule: Any) -> None:
        self._rule = rule

    def at(self, step: int) -> Any:
        return self._rule


@pytest.fixture
def generator() -> Any:
    """SKDSamplesGenerator with nothing behind it; enough to turn responses into Experience."""
    from skd_plugin.host.samples import SKDSamplesGenerator
    from tests.rules import make_rule

    return SKDSamplesGenerator(
        SimpleNamespace(args=None), None, None, None, [], plan=_AlwaysTheSame(make_rule(top_k=1)), seed=0
    )


def make_response(prompt: list[int], response: list[int], reward: float | None = None) -> dict[str, Any]:
    from skd_plugin.host.trace_store import StoredTrace

    return {
        "prompt": "p", "label": "l", "images": None, "mm_train_inputs": None, "reward": reward, "scores": reward,
        "observation_tokens": prompt + response, "action_ranges": [(len(prompt), len(prompt) + len(response))],
        "rollout_log_probs": None, "truncated": False, "extra_logs": {},
        "skd": StoredTrace.put(make_trace(response), 4),
    }  # fmt: skip


def test_action_mask_is_shifted_by_one(generator: Any) -> None:
    """Entry t of action_mask belongs to token t + 1; token_losses relies on it."""
    experience = generator._process_response_into_experience(make_response([5, 6, 7], [8, 9]), max_len=16)
    assert experience.sequences.tolist() == [[5, 6, 7, 8, 9]]
    assert experience.action_mask.tolist() == [[0, 0, 1, 1]], "revisit skd_plugin/core/layout.py"


def test_overlong_sequence_is_cut_at_its_end(generator: Any) -> None:
    """The mask then covers the first tokens of the trace, and token_losses cuts the trace to it."""
    experience = generator._process_response_into_experience(make_response([5, 6, 7], [8, 9, 10]), max_len=5)
    assert experience.sequences.tolist() == [[5, 6, 7, 8, 9]], "revisit present() in skd_plugin/host/batch.py"
    assert experience.action_mask.tolist() == [[0, 0, 1, 1]]
    assert len(experience.info["skd"][0]) == 3


def test_traces_survive_the_way_into_a_training_batch(generator: Any) -> None:
    """Experience maker, replay buffer and data loader split and join `info`; each trace stays with its sequence."""
    from openrlhf.trainer.ppo_utils.experience import (
        make_experience_batch,
        remove_padding_in_sequences,
        split_experience_batch,
    )

    from skd_plugin.host.samples import RewardFreeExperienceMaker
    from skd_plugin.host.trace_store import fetch

    args = SimpleNamespace(
        train=SimpleNamespace(dynamic_batch_enable=False),
        rollout=SimpleNamespace(micro_batch_size=2),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="reinforce")),
    )
    maker = RewardFreeExperienceMaker(None, None, None, None, None, SimpleNamespace(args=args), _Tokenizer())
    responses = [[8], [9, 10, 11], [12, 13], [14, 15, 16, 17]]
    samples = [generator._process_response_into_experience(make_response([5, 6], r), max_len=64) for r in responses]
    batches = maker.make_experience_batch(samples)
    assert [len(batch.info["skd"]) for batch in batches] == [2, 2]
    items = []
    for batch in batches:
        items += remove_padding_in_sequences(split_experience_batch(batch.to_device(torch.device("cpu"))))
    for order in ([3, 0, 2], [1, 2]):
        batch = make_experience_batch([items[i] for i in order]).to_device(torch.device("cpu"))
        for row, index in enumerate(order):
            trained = batch.sequences[row, 1:][batch.action_mask[row].bool()].tolist()
            assert trained == responses[index]
            (trace,) = fetch([batch.info["skd"][row]])
            assert trace.response_ids.tolist() == trained, "revisit skd_plugin/host/samples.py"


def test_reward_free_batch_has_the_reward_that_the_host_prints(generator: Any) -> None:
    from skd_plugin.host.samples import RewardFreeExperienceMaker

    args = SimpleNamespace(
        train=SimpleNamespace(dynamic_batch_enable=False),
        rollout=SimpleNamespace(micro_batch_size=4),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="reinforce")),
    )
    maker = RewardFreeExperienceMaker(None, None, None, None, None, SimpleNamespace(args=args), _Tokenizer())
    samples = [generator._process_response_into_experience(make_response([5, 6], [7]), max_len=64) for _ in range(2)]
    trainer = find(f"{PPO}:PPOTrainer")
    stats = trainer._compute_rollout_stats(None, maker.make_experience_batch(samples))
    assert stats["rollout/reward_mean"] != stats["rollout/reward_mean"], "revisit skd_plugin/host/evaluation.py"
    scored = [generator._process_response_into_experience(make_response([5], [7], 1.0), max_len=64) for _ in range(2)]
    assert trainer._compute_rollout_stats(None, maker.make_experience_batch(scored))["rollout/reward_mean"] == 1.0


def test_subclass_fields_would_be_dropped() -> None:
    """Why traces travel in `info`. If this fails, a field of an Experience subclass has become possible."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    @dataclasses.dataclass
    class More(Experience):
        extra: torch.Tensor | None = None

    joined = Experience.concat_experiences([More(sequences=torch.ones(1, 2), extra=torch.ones(1))], 0)
    assert not hasattr(joined, "extra"), "skd_plugin/host/samples.py could use a field now"


@pytest.mark.parametrize("name", "sequences action_mask attention_mask info rewards truncated prompts labels".split())
def test_experience_has_the_field(name: str) -> None:
    fields = {f.name for f in dataclasses.fields(find(f"{EXPERIENCE}:Experience"))}
    assert name in fields, "revisit skd_plugin/host/samples.py and host/training_side.py"


def test_samples_a_prompt_follow_the_call_and_not_the_recipe() -> None:
    """Evaluation asks for its own number of samples by this keyword (host/evaluation.py)."""
    source = inspect.getsource(find(f"{SAMPLES}._dispatch_prompts_to_vllm"))
    assert 'generate_kwargs.get("n_samples_per_prompt"' in source, "revisit skd_plugin/host/evaluation.py"


# --- several teachers (host/samples.py, host/bind.py) ---

TEACHERS = {"math": 1, "words": 2}  # with their engines


def skd_of_teachers() -> Any:
    from skd_plugin.config.schema import parse_skd
    from tests.recipes import PAIR

    model = {"model_name_or_path": str(PAIR / "teacher")}
    teachers = {name: {**model, "engines": number} for name, number in TEACHERS.items()}
    return parse_skd({"teachers": teachers, "teacher_column": "by"})


def test_prompts_go_to_the_engines_of_their_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the host's own dispatch, which spreads those of each teacher by the load of its engines."""
    from openrlhf.trainer.ppo_utils import samples_generator

    from skd_plugin.host.asked import AskedPrompt, Asking, SampledBy
    from skd_plugin.host.samples import SKDSamplesGenerator
    from skd_plugin.host.sent_once import SentOnce
    from skd_plugin.host.teacher_prompts import PairedPrompt
    from skd_plugin.models import load_tokenizer
    from tests.recipes import PAIR
    from tests.rules import make_rule

    sent: list[tuple[int, str, str]] = []

    def engine(number: int, load: int) -> Any:
        asked: list[AskedPrompt] = []

        def ask(key: str, calls: list[dict[str, Any]]) -> None:
            for call in calls:
                assert call["hf_tokenizer"] == SentOnce("a reference"), "the tokenizer goes with each prompt"
                asked.append(call["prompt"])
                sent.append((number, str(call["prompt"].prompt), call["label"]))

        remote = {
            "get_num_unfinished_requests": lambda: load,
            "ask": ask,
            "responses": lambda key, number: [f"of {asked.pop(0).prompt}" for _ in range(number)],
        }
        return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in remote.items()})

    monkeypatch.setattr(samples_generator.ray, "get", lambda refs: refs)
    monkeypatch.setattr(samples_generator.ray, "put", lambda _: "a reference")
    args = SimpleNamespace(
        skd=skd_of_teachers(),
        algo=SimpleNamespace(advantage=SimpleNamespace(is_correction_level="off"), dynamic_filtering_enable=False),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
    )
    tokenizer = load_tokenizer(str(PAIR / "student"), "student")
    engines = [engine(0, load=9), engine(1, load=1), engine(2, load=0)]
    generator = SKDSamplesGenerator(SimpleNamespace(args=args), None, None, tokenizer, engines, plan=None, seed=0)
    names = ["words", "math", "words", "math", "words"]
    texts = [f"tom has {number} coins ." for number in range(5)]
    prompts = [PairedPrompt(text, None, name) for text, name in zip(texts, names, strict=True)]
    labels = [f"label {number}" for number in range(5)]
    asking = Asking(SampledBy(make_rule(top_k=1), 0))
    kwargs = {"max_len": 64, "max_new_tokens": 8, "n_samples_per_prompt": 1, "asking": asking}
    refs = generator._dispatch_prompts_to_vllm(prompts, labels, images=[None] * 5, **kwargs)
    ours = "revisit _dispatch_prompts_to_vllm in skd_plugin/host/samples.py"
    assert sorted(response for ref in refs for response in ref) == [f"of {text}" for text in texts], ours
    by_engine = {number: [text for own, text, _ in sent if own == number] for number in range(3)}
    assert by_engine[0] == [texts[1], texts[3]], ours
    assert len(by_engine[1]) == 1 and len(by_engine[2]) == 2, f"not by load: {by_engine}; {ours}"
    assert {text: label for _, text, label in sent} == dict(zip(texts, labels, strict=True)), ours
    assert generator.vllm_engines == engines and generator.tokenizer is tokenizer, ours
    generator.vllm_engines = engines[:2]
    del generator._teachers
    with pytest.raises(RuntimeError, match="there are 2 engines, but teachers for 3"):
        generator._dispatch_prompts_to_vllm(prompts, labels, images=[None] * 5, **kwargs)


def test_engines_are_made_in_the_order_of_their_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host asks the class that stands in its module for `options` once an engine."""
    import openrlhf.trainer.ray.vllm_engine as vllm_engine

    from skd_plugin.config.run import Run
    from skd_plugin.host import bind

    run = Run(skd_of_teachers(), {"vllm.num_engines": 3}, cpu=True)
    made: list[str] = []
    monkeypatch.setattr(bind, "rollout_class", lambda run, name: name)
    actor = SimpleNamespace(remote=lambda **_: len(made))

    def remote(name: str) -> Any:
        made.append(name)
        return SimpleNamespace(options=lambda **_: actor)

    monkeypatch.setattr(bind.ray, "remote", remote)
    monkeypatch.setattr(vllm_engine, "RolloutRayActor", bind.RolloutActors(run))
    place = SimpleNamespace()
    engines = vllm_engine.create_vllm_engines(3, 1, "student", 1, False, True, True, 64, place)
    assert made == ["math", "words", "words"] and engines == [1, 2, 3], "revisit RolloutActors in host/bind.py"


# --- the loss (host/objective.py) ---


def test_actor_forward_returns_the_logits_that_the_loss_reads() -> None:
    """A tuple (log-probs, output) when asked for the output; unshifted float32 logits in it, at temperature 1."""
    from openrlhf.models import Actor
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    actor = Actor(LlamaForCausalLM(config))
    actor.packing_samples = False
    ids, ones = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    log_probs, output = actor(ids, ones[:, 1:], attention_mask=ones, return_output=True)
    assert output["logits"].shape == (2, 6, 16) and output["logits"].dtype == torch.float32
    expected = output["logits"][:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(log_probs, expected)


def test_actor_gives_the_models_output_when_asked_for_nothing_else() -> None:
    """ChunkedActor calls the host's forward so: whatever the head gave comes back as float32 logits."""
    from openrlhf.models import Actor
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    actor = Actor(model)
    actor.packing_samples = False
    model.get_output_embeddings().forward = lambda hidden: hidden[..., :3].double()
    ids, ones = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    output = actor(ids, None, ones, return_output=True)
    ours = "revisit skd_plugin/host/chunked_actor.py"
    assert output["logits"].shape == (2, 6, 3) and output["logits"].dtype == torch.float32, ours
    source = inspect.getsource(find(f"{ACTOR}:PolicyModelActor.init_model_from_pretrained"))
    assert "actor = Actor(" in source and "ema_model = Actor(" in source, "revisit SKDPolicy in host/policy_actor.py"


def test_step_totals_are_arguments_of_the_reduction() -> None:
    from openrlhf.models import aggregate_loss
    from openrlhf.utils.loss_utils import iter_grad_accum_global_norm

    masks = [torch.ones(2, 3), torch.zeros(2, 3)]
    pairs = list(iter_grad_accum_global_norm(masks, SimpleNamespace(), 2, lambda mask: mask))
    assert [info["batch_num_tokens"].item() for _, info in pairs] == [3.0, 3.0]  # 6 tokens / 2 micro-batches
    accepted = set(inspect.signature(aggregate_loss).parameters)
    assert set(pairs[0][1]) <= accepted, "revisit skd_plugin/host/objective.py, StepLoss._distillation_loss"


def test_loss_of_the_host_is_unpacked_into_five() -> None:
    """The first has a gradient, the second and third are detached, the last two may be None."""
    source = inspect.getsource(find(f"{ACTOR}:ActorPPOTrainer.training_step"))
    assert "actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = self.actor_loss_fn(" in source, (
        "revisit the result of StepLoss in skd_plugin/host/objective.py"
    )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_host_knows_the_aggregation_mode(mode: str) -> None:
    action = next(a for a in host_parser()._actions if a.dest == "actor.loss_agg_mode")
    assert mode in action.choices and len(action.choices) == 2, (
        "revisit SKDActorTrainer in skd_plugin/host/policy_actor.py"
    )


# --- options (config/host_options.py, config/host_rules.py, prepare/load_run.py) ---


def _describe(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    described = {}
    for action in parser._actions:
        default = None if action.dest == "logger.wandb.run_name" else action.default  # it holds the time of day
        described[",".join(action.option_strings)] = (
            action.dest, type(action).__name__, action.type, action.nargs, action.const, default, action.choices,
        )  # fmt: skip
    return described


@pytest.fixture
def real_parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of the host's script, caught when the script parses."""

    def reached(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise _Reached(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", reached)
    with pytest.raises(_Reached) as caught:
        _run_host([], monkeypatch)
    return caught.value.args[0]


def test_host_parser_is_the_real_one(real_parser: argparse.ArgumentParser) -> None:
    assert len(real_parser._actions) > 100
    assert _describe(host_parser()) == _describe(real_parser), "revisit skd_plugin/config/host_options.py"


def test_every_host_option_is_a_dotted_name_of_its_own() -> None:
    """A recipe key is the option's `dest`; the flag that sets it must be --<dest>."""
    odd = [a.dest for a in host_parser()._actions if f"--{a.dest}" not in a.option_strings and a.nargs != 0]
    assert not odd, f"{odd} cannot be set as --<key>; revisit skd_plugin/config/host_options.py"


RUN_OPTIONS = [
    "actor.model_name_or_path", "ckpt.load_enable", "ckpt.output_dir", "ckpt.path", "data.apply_chat_template",
    "data.input_key", "data.input_template", "data.label_key", "data.max_len", "data.prompt_dataset", "ds.param_dtype",
    "eval.dataset", "logger.tensorboard_dir", "logger.wandb.run_name", "reward.remote_url", "rollout.batch_size",
    "rollout.max_new_tokens", "rollout.n_samples_per_prompt", "train.batch_size", "vllm.sync_with_ray",
]  # fmt: skip


@pytest.mark.parametrize("key", RUN_OPTIONS)
def test_option_that_the_plugin_sets_or_reads_exists(key: str) -> None:
    assert key in {a.dest for a in host_parser()._actions}, f"'{key}' is gone; revisit skd_plugin/prepare/load_run.py"


@pytest.mark.parametrize("key", [*host_rules.DEFAULTS, *host_rules.CPU_DEFAULTS])
def test_default_of_a_distillation_run_exists(key: str) -> None:
    value = (host_rules.DEFAULTS | host_rules.CPU_DEFAULTS)[key]
    actions = {a.dest: a for a in host_parser()._actions}
    assert key in actions, f"'{key}' is gone; revisit skd_plugin/config/host_rules.py"
    assert actions[key].choices is None or value in actions[key].choices


@pytest.mark.parametrize("key", list(host_rules.FIXED))
def test_refused_option_exists_and_its_allowed_value_is_what_a_run_gets(key: str) -> None:
    actions = {a.dest: a for a in host_parser()._actions}
    assert key in actions, f"'{key}' is gone; revisit FIXED in skd_plugin/config/host_rules.py"
    gets = host_rules.DEFAULTS.get(key, actions[key].default)
    assert gets == host_rules.FIXED[key][0], f"a recipe that says nothing of '{key}' gets {gets}, which is refused"


def test_events_are_written_into_the_run_folder() -> None:
    source = inspect.getsource(find("openrlhf.utils.logging_utils:TensorboardLogger"))
    assert "os.path.join(args.logger.tensorboard_dir, args.logger.wandb.run_name)" in source, (
        "revisit host_options_of in skd_plugin/prepare/load_run.py"
    )


def test_prompts_are_made_in_the_form_that_the_host_gives_them() -> None:
    from openrlhf.datasets import prompts_dataset

    row = {"q": "two", "a": "2"}
    preprocess_data = prompts_dataset.preprocess_data
    assert preprocess_data(row, "say {}", "q", apply_chat_template=None)[0] == "say two", "revisit host/prompts.py"
    chat = preprocess_data(row, None, "q", apply_chat_template=lambda turns, **_: json.dumps(turns))[0]
    assert json.loads(chat) == [{"role": "user", "content": "two"}]


# --- a machine without CUDA (host/on_cpu.py) ---

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="these adaptations are for machines without CUDA")


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adaptations of a trainer process, undone afterwards."""
    import deepspeed.runtime.zero.partition_parameters as partition_parameters
    import openrlhf.trainer.ppo_utils.replay_buffer as replay_buffer
    import openrlhf.trainer.ray.ppo_actor as ppo_actor
    import openrlhf.utils.distributed_util as distributed_util
    import openrlhf.utils.utils as host_utils

    from skd_plugin.host import on_cpu

    for module, name in (
        (replay_buffer, "torch"),
        (host_utils, "convert_to_torch_dtype"),
        (ppo_actor, "stateless_init_process_group"),
        (distributed_util, "stateless_init_process_group"),
        (partition_parameters, "dist"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    on_cpu.adapt_trainer()


@without_cuda
def test_replay_buffer_lives_on_the_cpu(adapted: None) -> None:
    buffer = find("openrlhf.trainer.ppo_utils.replay_buffer:NaiveReplayBuffer")(2)
    assert buffer.target_device == torch.device("cpu"), "revisit adapt_trainer in skd_plugin/host/on_cpu.py"


@without_cuda
def test_gathering_waits_for_every_parameter(adapted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 waits for the last of them, which on a CPU may end first."""
    import deepspeed.runtime.zero.partition_parameters as partition_parameters

    source = inspect.getsource(partition_parameters.Init)
    assert "h = dist.all_gather_into_tensor(" in source and "launch_handles[-1].wait()" in source, (
        "revisit _GatherOnCpu in skd_plugin/host/on_cpu.py"
    )
    handle = MagicMock()
    monkeypatch.setattr(deepspeed.comm, "all_gather_into_tensor", lambda *args, **kwargs: handle)
    assert partition_parameters.dist.all_gather_into_tensor(async_op=True) is handle
    handle.wait.assert_called_once_with()


@without_cuda
def test_padding_helpers_are_those_of_flash_attention() -> None:
    """Shapes and values that OpenRLHF's packing expects; tests/contract/test_packing.py runs it."""
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input

    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 0]])
    values = torch.arange(9.0).view(3, 3, 1)
    rows, places, starts, longest, lengths = unpad_input(values, mask)
    assert rows.flatten().tolist() == [0, 1, 2, 4, 6, 7] == places.tolist()
    assert starts.tolist() == [0, 3, 4, 6] and starts.dtype == torch.int32 and longest == 3
    assert lengths.tolist() == [3, 1, 2]
    assert torch.equal(pad_input(rows, places, 3, 3), values * mask[..., None])
    assert torch.equal(index_first_axis(rearrange(values, "b s ... -> (b s) ..."), places), rows)


@without_cuda
def test_weight_sync_of_both_ends_is_gloo(adapted: None) -> None:
    """The trainer looks the function up in ppo_actor, the worker imports it when it is called."""
    import openrlhf.trainer.ray.ppo_actor as ppo_actor

    from skd_plugin.engine.gloo import gloo_process_group

    assert ppo_actor.stateless_init_process_group is gloo_process_group, "revisit skd_plugin/host/on_cpu.py"
    code = find(f"{ACTOR}:ActorPPOTrainer._init_vllm_sync_group").__code__
    assert "stateless_init_process_group" in code.co_names
    inside = imports_inside(find(f"{WRAP}.init_process_group"))
    assert ("openrlhf.utils.distributed_util", "stateless_init_process_group") in inside, "revisit host/on_cpu.py"


@without_cuda
def test_actor_is_loaded_in_float32(adapted: None) -> None:
    """Actor imports the conversion when it is called, so that the rebound one is found."""
    inside = imports_inside(find("openrlhf.models:Actor.__init__"))
    assert ("openrlhf.utils.utils", "convert_to_torch_dtype") in inside, "revisit skd_plugin/host/on_cpu.py"
    assert find("openrlhf.utils.utils:convert_to_torch_dtype")("fp32") == torch.float32


@without_cuda
def test_deepspeed_asks_its_module_for_the_operator_that_we_leave_out(adapted: None) -> None:
    from deepspeed.accelerator import get_accelerator

    from skd_plugin.host.on_cpu import SHARED_MEMORY_OP

    module = importlib.import_module("deepspeed.comm.torch")  # `import ... as` would find torch itself
    assert get_accelerator().create_op_builder("ShareMemCommBuilder").NAME == SHARED_MEMORY_OP
    assert "build_shm_op" in module.TorchBackend.__init__.__code__.co_names, "revisit skd_plugin/host/on_cpu.py"
    assert module.build_shm_op() is None
    assert "shm_comm_op != None" in inspect.getsource(module.TorchBackend), "None is no longer an answer"


def test_nothing_is_compiled_for_the_optimizer(adapted: None) -> None:
    """DeepSpeed takes torch's AdamW where the configuration says so; the strategy asks its module for that."""
    import openrlhf.utils.deepspeed.deepspeed as strategy
    from deepspeed.runtime.engine import DeepSpeedEngine

    adam = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}}
    config = strategy.get_train_ds_config(False, optim_config=adam)
    parameters = dict(config["optimizer"]["params"])
    chosen = DeepSpeedEngine.get_optimizer_configuration(SimpleNamespace(), parameters, True)
    assert chosen[0] is torch.optim.AdamW and parameters["fused"], "revisit skd_plugin/host/on_cpu.py"
    names = strategy.DeepspeedStrategy.get_ds_train_config.__code__.co_names
    assert "get_train_ds_config" in names, "revisit skd_plugin/host/on_cpu.py"


def test_every_flash_attention_import_at_import_time_has_a_stub() -> None:
    """Only what the host imports unconditionally; a guarded import must keep failing."""
    root = Path(find("openrlhf").__file__).parent
    wanted = set()
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text(), str(path)).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flash_attn":
                wanted |= {(node.module, alias.name) for alias in node.names}
    assert wanted, "the host no longer needs flash-attn; remove the stubs of skd_plugin/host/on_cpu.py"
    for module, name in wanted:
        assert hasattr(importlib.import_module(module), name), f"add {module}.{name} to skd_plugin/host/on_cpu.py"


@without_cuda
def test_device_mesh_of_cuda_is_one_of_the_cpu() -> None:
    source = inspect.getsource(importlib.import_module("openrlhf.utils.deepspeed.deepspeed"))
    assert "init_device_mesh(" in source, "revisit install in skd_plugin/cpu.py"
    assert torch.distributed.device_mesh.init_device_mesh.__module__ == "skd_plugin.cpu"


# --- going on from a checkpoint (run/resume.py) ---


def test_file_that_ends_a_checkpoint() -> None:
    """Written behind the barrier of all ranks, so that a checkpoint with it is whole."""
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    from skd_plugin.run.resume import METRIC_FILE

    assert DeepspeedStrategy.CKPT_METRIC_FILENAME == METRIC_FILE, "revisit skd_plugin/run/resume.py"
    source = inspect.getsource(DeepspeedStrategy.save_ckpt)
    assert source.index("model.save_checkpoint(") < source.index("self._write_ckpt_metric(")


def test_nested_options_are_made_by_the_hosts_function() -> None:
    from openrlhf.utils.config import hierarchize as theirs

    from skd_plugin.config.host_options import hierarchize as ours

    flat = argparse.Namespace(**{"a.b": 1, "a.c.d": [2], "e": None})
    assert ours(flat) == theirs(flat), "revisit skd_plugin/config/host_options.py"
