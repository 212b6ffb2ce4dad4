"""OpenRLHF's own launch scripts, as recipes: how many run with nothing changed but models, data and places.

Their options as of OpenRLHF 3c3be62, the last commit before 0.11.2 whose scripts were to be had; the README's main
command is that of 0.11.2. Where those scripts say `is_correction_enable` and `is_correction_type`, 0.11.2 says
`is_correction_level` and `is_correction_mode`. Its README names `prompt_max_len` and `generate_max_len`, which 0.11.2
lacks, and which are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from skd_plugin.config.host_options import host_parser
from skd_plugin.config.run import Run
from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import load_run
from tests.stand_ins import write_model

# Script -> what is refused of it, in the order of the refusals. A refusal that is lifted leaves this table.
REFUSED: dict[str, list[str]] = {
    "train_vlm_math_hybrid_engine.sh": ["data.max_images_per_prompt", "actor.freeze_visual_encoder"],
}


def nodes(*roles: str, gpus: int) -> str:
    return " ".join(f"{role}.num_nodes=1 {role}.num_gpus_per_node={gpus}" for role in roles)


ONE_CORRECTION = "algo.advantage.is_correction_level=token algo.advantage.is_correction_mode=clip"
ICEPOP = "algo.advantage.is_correction_level=token algo.advantage.is_correction_mode=mask"
ASLEEP = "vllm.sync_backend=nccl vllm.enforce_eager=true vllm.enable_sleep=true ds.enable_sleep=true"
ZERO_3 = "ds.zero_stage=3 ds.param_dtype=bf16 actor.gradient_checkpointing_enable=true"
PACKED = f"{ZERO_3} ds.packing_samples=true"
CHAT = "data.prompt_dataset=PROMPTS data.input_key=context_messages data.apply_chat_template=true"
PROMPTS = "data.prompt_dataset=PROMPTS data.input_key=prompt data.label_key=label data.apply_chat_template=true"
CRITIC = "critic.adam.lr=9e-6 algo.kl.init_coef=0.01 reward.normalize_enable=true"
FILTERED = "algo.dynamic_filtering_enable=true"
REASONING = f"""
    train.agent_func_path=AGENT {PROMPTS} {PACKED} {ICEPOP} {FILTERED} algo.dynamic_filtering_range=[0.0,1.0]
    ckpt.load_enable=true ckpt.output_dir=MODEL ckpt.path=CKPT ckpt.save_hf=true ckpt.max_num=3 ckpt.save_steps=10
    data.max_len=74240 rollout.max_new_tokens=64000 data.max_samples=128000
    rollout.batch_size=128 rollout.n_samples_per_prompt=8 train.batch_size=1024 train.max_epochs=1
    train.num_episodes=1 train.micro_batch_size=1 rollout.micro_batch_size=8
    train.dynamic_batch_enable=true train.max_tokens_per_gpu=16192 rollout.max_tokens_per_gpu=32768
    {nodes("ref", "actor", gpus=4)} vllm.num_engines=2 vllm.tensor_parallel_size=2 train.colocate_all=true
    ds.enable_sleep=true vllm.sync_backend=nccl vllm.enforce_eager=true ds.ring_attn_size=2 ds.ring_attn_head_stride=2
    algo.advantage.estimator=reinforce_baseline actor.adam.lr=5e-7 actor.entropy_coef=0.0 algo.kl.init_coef=1e-5
    algo.kl.use_loss=true algo.kl.estimator=k2 logger.tensorboard_dir=BOARD logger.logging_steps=1 eval.steps=-1
"""
PPO_8B = f"""
    {nodes("ref", "reward", "critic", "actor", gpus=8)} vllm.num_engines=4 vllm.tensor_parallel_size=2
    train.colocate_all=true vllm.gpu_memory_utilization=0.5 reward.model_name_or_path=REWARD_MODEL
    ckpt.output_dir=MODEL ckpt.path=CKPT ckpt.save_hf=true train.batch_size=128 rollout.batch_size=1024
    rollout.n_samples_per_prompt=1 train.max_epochs=1 data.max_samples=100000 actor.adam.lr=5e-7
    {CRITIC} {CHAT} {PACKED} {ASLEEP} train.dynamic_batch_enable=true
"""
SCRIPTS: dict[str, str] = {
    "train_ppo_with_reward_fn.sh": f"""
        {nodes("ref", "critic", "actor", gpus=2)} vllm.num_engines=2 vllm.tensor_parallel_size=2
        train.colocate_actor_ref=true reward.remote_url=REWARD ckpt.output_dir=MODEL train.micro_batch_size=8
        train.batch_size=128 rollout.micro_batch_size=16 rollout.batch_size=1024 data.max_samples=100000
        train.max_epochs=1 data.max_len=2048 actor.adam.lr=5e-7 {CRITIC} {CHAT} {PACKED} ds.adam_offload=true
        ds.attn_implementation=flash_attention_2 logger.wandb.key=KEY
    """,
    "train_ppo_ray_slurm.sh": f"""
        {nodes("ref", "reward", "critic", "actor", gpus=4)} vllm.num_engines=4 vllm.tensor_parallel_size=2
        train.colocate_critic_reward=true train.colocate_actor_ref=true reward.model_name_or_path=REWARD_MODEL
        ckpt.output_dir=MODEL train.micro_batch_size=8 train.batch_size=128 rollout.micro_batch_size=16
        rollout.batch_size=1024 data.max_samples=100000 train.max_epochs=1 data.max_len=2048 actor.adam.lr=5e-7
        {CRITIC} {CHAT} {PACKED} ds.adam_offload=true vllm.sync_backend=nccl logger.wandb.key=KEY
    """,
    "train_dapo_ray_hybrid_engine.sh": f"""
        {nodes("ref", "actor", gpus=8)} vllm.num_engines=4 vllm.tensor_parallel_size=2 train.colocate_all=true
        vllm.gpu_memory_utilization=0.6 algo.kl.init_coef=1e-3 algo.advantage.gamma=1.0 algo.kl.use_loss=true
        algo.kl.estimator=k3 algo.advantage.estimator=group_norm {FILTERED} algo.dynamic_filtering_range=[0,1]
        actor.eps_clip_low_high=[0.2,0.27] reward.remote_url=REWARD ckpt.output_dir=MODEL ckpt.path=CKPT
        ckpt.save_steps=20 ckpt.save_hf=true train.micro_batch_size=8 train.batch_size=128
        rollout.micro_batch_size=16 rollout.batch_size=128 rollout.n_samples_per_prompt=8 train.max_epochs=1
        data.max_len=2048 data.max_samples=20000 actor.adam.lr=5e-7 {CHAT} {PACKED} {ASLEEP} {ONE_CORRECTION}
    """,
    "train_ppo_ray_hybrid_engine.sh": f"{PPO_8B} data.max_len=2048 train.max_tokens_per_gpu=16384 {ONE_CORRECTION}",
    "train_prorlv2_math_hybrid_engine.sh": f"""
        {nodes("ref", "actor", gpus=8)} vllm.num_engines=8 vllm.tensor_parallel_size=1 train.colocate_all=true
        vllm.gpu_memory_utilization=0.75 algo.kl.init_coef=1e-4 algo.advantage.gamma=1.0 algo.kl.use_loss=true
        algo.kl.estimator=k2 algo.advantage.estimator=reinforce_baseline {FILTERED}
        algo.dynamic_filtering_range=[0,1] actor.eps_clip_low_high=[0.2,0.27] reward.remote_url=REWARD
        ckpt.output_dir=MODEL ckpt.path=CKPT ckpt.save_steps=5 ckpt.save_hf=true train.batch_size=1024
        rollout.batch_size=512 rollout.n_samples_per_prompt=16 train.dynamic_batch_enable=true train.num_episodes=100
        data.max_len=9216 rollout.max_new_tokens=8192 actor.adam.lr=1e-6 {PROMPTS} eval.dataset=HELD_OUT
        eval.steps=5 eval.temperature=1.0 eval.n_samples_per_prompt=4 {PACKED} {ASLEEP} {ICEPOP}
        algo.advantage.is_correction_threshold=[0.5,5.0] train.max_tokens_per_gpu=32768
        reward.stop_properly_penalty_coef=0.0
    """,
    "README.md": f"{PPO_8B} logger.wandb.key=KEY",
    "train_reinforce_baseline_hybrid_engine.sh": f"{REASONING} vllm.gpu_memory_utilization=0.7",
    "train_reinforce_baseline_ray_agent_async.sh": f"""
        {REASONING} vllm.gpu_memory_utilization=0.95 train.async_enable=true train.partial_rollout_enable=true
    """,
    "train_vlm_math_hybrid_engine.sh": f"""
        {nodes("ref", "actor", gpus=4)} vllm.num_engines=4 vllm.tensor_parallel_size=1 train.colocate_all=true
        vllm.gpu_memory_utilization=0.7 algo.kl.init_coef=0 algo.advantage.gamma=1.0 algo.kl.use_loss=true
        algo.kl.estimator=k2 algo.advantage.estimator=reinforce_baseline reward.remote_url=REWARD
        ckpt.output_dir=MODEL ckpt.path=CKPT ckpt.save_hf=true ckpt.save_steps=5 eval.steps=-1
        train.micro_batch_size=1 rollout.micro_batch_size=1 train.batch_size=1024 rollout.batch_size=128
        rollout.n_samples_per_prompt=8 train.num_episodes=100 data.max_len=4096 rollout.max_new_tokens=2048
        actor.adam.lr=2e-6 {PROMPTS} data.image_key=images data.max_images_per_prompt=1
        actor.freeze_visual_encoder=true {ZERO_3} ds.attn_implementation=eager {ASLEEP}
    """,
}
AGENT = """
from openrlhf.utils.agent import SingleTurnAgentExecutor

class AgentExecutor(SingleTurnAgentExecutor):
    pass
"""
SWITCHED_OFF: dict[str, Any] = {"data.max_images_per_prompt": 0}  # of others: false


def options_of(script: str) -> dict[str, str]:
    return dict(option.split("=", 1) for option in SCRIPTS[script].split())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What stands where a script names a model, data or code of its own."""
    folder = tmp_path_factory.mktemp("upstream")
    sizes = dict(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes, max_position_embeddings=131072)
    rows = [
        {"prompt": f"How many are {n}?", "label": str(n), "context_messages": [{"role": "user", "content": f"{n}?"}]}
        for n in range(1024)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n    return [0.0 for _ in queries]\n"
    )
    agent = (
        "from openrlhf.utils.agent import SingleTurnAgentExecutor\n\n\nclass AgentExecutor(SingleTurnAgentExecutor):\n"
    )
    (folder / "agent.py").write_text(agent + "    pass\n")
    model = write_model(folder / "model", config)
    return {"PROMPTS": folder / "prompts.jsonl", "HELD_OUT": folder / "prompts.jsonl", "REWARD": folder / "reward.py",
            "AGENT": folder / "agent.py", "REWARD_MODEL": model, "STUDENT": model}  # fmt: skip


def load(script: str, places: dict[str, Path], folder: Path, changed: dict[str, Any]) -> Run:
    """A recipe of the script's options, with a teacher, a student and a share of both losses."""
    outputs = {name: folder / name.lower() for name in ("MODEL", "CKPT", "BOARD")}
    options = {name: str((places | outputs).get(value, value)) for name, value in options_of(script).items()}
    if any(name.startswith("critic.") for name in options):
        options["algo.advantage.estimator"] = "gae"  # OpenRLHF's default, which a run with a teacher does not have
    student = places["STUDENT"]
    recipe = folder / "recipe.yaml"
    recipe.write_text("skd: {device: cuda, objective: {rl_coef: 1.0}}\n")
    return load_run(
        recipe,
        [
            f"skd.run_dir={folder / 'run'}", f"skd.teacher.model_name_or_path={student}",
            f"openrlhf.actor.model_name_or_path={student}",
            *(f"openrlhf.{name}={json.dumps(value) if name in changed else value}"
              for name, value in (options | changed).items()),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_loads_but_for_what_is_refused(
    script: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal is of an option by its name; with those switched off the script loads, and its options arrive."""
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")  # where its GPUs are
    changed: dict[str, Any] = {}
    for option in REFUSED.get(script, []):
        with pytest.raises(RecipeError, match=rf"^openrlhf\.{re.escape(option)} is .*, but must be "):
            load(script, places, tmp_path, changed)
        changed[option] = SWITCHED_OFF.get(option, False)
    run = load(script, places, tmp_path, changed)
    found, wanted = (vars(host_parser().parse_args(argv)) for argv in (run.host_argv(), command_line(script)))
    kept = {name for name, value in options_of(script).items() if not value.isupper()} - changed.keys()
    assert {name: found[name] for name in kept} == {name: wanted[name] for name in kept}


def command_line(script: str) -> list[str]:
    """The options as the script gives them: a switch has no value, a list has several."""
    words: list[str] = []
    for name, value in options_of(script).items():
        words += [f"--{name}", *([] if value == "true" else value.strip("[]").split(","))]
    return words


def test_the_table_names_scripts_that_there_are() -> None:
    assert REFUSED.keys() <= SCRIPTS.keys() and len(SCRIPTS) == 9
