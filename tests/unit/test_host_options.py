"""OpenRLHF's options: its command line, the defaults of a distillation run, and what such a run refuses."""

from __future__ import annotations

import pytest

from skd_plugin.config import host_rules
from skd_plugin.config.host_options import host_arguments, host_defaults, host_parser
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError


def test_host_section_becomes_its_command_line() -> None:
    section = {
        "train": {"batch_size": 8, "colocate_all": True, "async_enable": False},
        "actor": {"adam": {"betas": [0.8, 0.9]}, "muon": {"nesterov": False}, "dual_clip": None},
    }
    arguments = host_arguments(section, host_parser())
    assert arguments == [
        "--train.batch_size", "8", "--train.colocate_all", "--actor.adam.betas", "0.8", "0.9",
        "--actor.muon.no_nesterov",
    ]  # fmt: skip
    parsed = vars(host_parser().parse_args(arguments))
    assert parsed["train.colocate_all"] is True and parsed["actor.muon.nesterov"] is False


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"batchsize": 8}}, r"openrlhf: unknown key 'train\.batchsize'; did you mean 'train\.batch_size'"),
        ({"train": {"batch_size": "many"}}, r"openrlhf: argument --train\.batch_size: invalid int value: 'many'"),
        ({"actor": {"optim": "sgd"}}, r"openrlhf: argument --actor\.optim: invalid choice: 'sgd'"),
        ({"train": {"colocate_all": "yes"}}, r"openrlhf: 'train\.colocate_all' is a switch; got 'yes'"),
    ],
)
def test_refused_host_value(section: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        host_arguments(section, host_parser())


def test_defaults_of_a_distillation_run_yield_to_the_recipe() -> None:
    host = host_rules.complete({"eval": {"temperature": 0.7}, "ds": {"zero_stage": 3}}, cpu=True)
    assert (host["eval.temperature"], host["ds.zero_stage"], host["vllm.sync_backend"]) == (0.7, 3, "gloo")
    assert "vllm.sync_backend" not in host_rules.complete({}, cpu=False)


def _complete(**changes: object) -> dict:
    return host_defaults() | host_rules.complete({}, cpu=True) | {"data.prompt_dataset": "prompts.jsonl"} | changes


REWARD_FREE = SKDConfig(teacher={"model_name_or_path": "t"})

WRONG = {
    "algo.kl.init_coef": 0.01, "algo.advantage.estimator": "group_norm", "rollout.temperature": 0.7,
    "rollout.top_p": 0.9,
    "data.max_images_per_prompt": 1,
    "data.image_key": "pictures",
}  # fmt: skip


def test_complete_options_pass() -> None:
    host_rules.check(_complete(), REWARD_FREE)


@pytest.mark.parametrize("key", list(host_rules.FIXED))
def test_host_option_that_a_distillation_run_cannot_honour(key: str) -> None:
    value = WRONG.get(key, True)
    allowed, reason = host_rules.FIXED[key]
    with pytest.raises(RecipeError) as caught:
        host_rules.check(_complete(**{key: value}), REWARD_FREE)
    assert str(caught.value) == f"openrlhf.{key} is {value!r}, but must be {allowed!r}: {reason}"


def test_rollouts_that_do_not_divide_into_training_batches() -> None:
    sizes = {"rollout.batch_size": 6, "rollout.n_samples_per_prompt": 2}
    host_rules.check(_complete(**sizes, **{"train.batch_size": 4}), REWARD_FREE)
    with pytest.raises(RecipeError, match=r"is 12, not a multiple of openrlhf\.train\.batch_size = 8"):
        host_rules.check(_complete(**sizes, **{"train.batch_size": 8}), REWARD_FREE)


@pytest.mark.parametrize("asked", [4, 16])
def test_a_step_sends_all_its_prompts_at_once(asked: int) -> None:
    """OpenRLHF would take what a smaller number brings for the end of the data, and never train."""
    options = {"rollout.batch_size": 8, "train.batch_size": 8}
    host_rules.check(_complete(**options, **{"rollout.vllm_generate_batch_size": 8}), REWARD_FREE)
    with pytest.raises(RecipeError, match=rf"vllm_generate_batch_size is {asked}, but a step takes .* = 8 prompts"):
        host_rules.check(_complete(**options, **{"rollout.vllm_generate_batch_size": asked}), REWARD_FREE)


@pytest.mark.parametrize(
    ("changes", "loss", "message"),
    [
        ({"actor.num_gpus_per_node": 3}, {}, r"= 3 actors make no whole rings of it"),
        ({"ds.packing_samples": False}, {}, r"set openrlhf\.ds\.packing_samples=true"),
        ({"ds.deepcompile": True}, {}, r"leave skd\.loss\.chunk and openrlhf\.ds\.deepcompile at their defaults"),
        ({}, {"chunk": None}, r"leave skd\.loss\.chunk and openrlhf\.ds\.deepcompile at their defaults"),
    ],
)
def test_rings_of_actors(changes: dict, loss: dict, message: str) -> None:
    ring = {"ds.ring_attn_size": 2, "ds.packing_samples": True, "actor.num_gpus_per_node": 4}
    skd = SKDConfig(teacher={"model_name_or_path": "t"}, loss=loss)
    host_rules.check(_complete(**ring), REWARD_FREE)
    with pytest.raises(RecipeError, match=rf"^openrlhf\.ds\.ring_attn_size is 2, but .*{message}"):
        host_rules.check(_complete(**ring | changes), skd)


@pytest.mark.parametrize(
    ("changes", "skd", "message"),
    [
        ({"actor.num_gpus_per_node": 3}, {}, r", but .* = 3 actors make no whole groups of it"),
        (
            {},
            {"loss": {"vocabulary": "full"}},
            r" beside skd\.loss\.vocabulary=full: no rank has",
        ),
        ({"ds.zero_stage": 3}, {}, r" beside openrlhf\.ds\.zero_stage=3: transformers loads no student for both"),
        ({"ds.lora.rank": 4}, {}, r" beside openrlhf\.ds\.lora\.rank: nobody has compared it"),
        ({"train.enable_ema": True}, {}, r" beside openrlhf\.train\.enable_ema: nobody has compared it"),
        ({"train.colocate_all": True}, {}, r" beside openrlhf\.train\.colocate_all: OpenRLHF then shares no memory"),
        (
            {"algo.kl.init_coef": 0.1},
            {"objective": {"rl_coef": 0.5}},
            r"\(a reference model\): nobody has",
        ),
    ],
)
def test_layers_spread_over_actors(changes: dict, skd: dict, message: str) -> None:
    spread = {"ds.tensor_parallel_size": 2, "actor.num_gpus_per_node": 4, "reward.remote_url": "f.py"}
    recipe = SKDConfig(teacher={"model_name_or_path": "t"}, **skd)
    host_rules.check(_complete(**spread), SKDConfig(teacher={"model_name_or_path": "t"}))
    with pytest.raises(RecipeError, match=rf"^openrlhf\.ds\.tensor_parallel_size is 2.*{message}"):
        host_rules.check(_complete(**spread | changes), recipe)


def test_an_optimizer_that_cannot_sleep() -> None:
    host_rules.check(_complete(**{"ds.enable_sleep": True, "ds.zero_stage": 2}), REWARD_FREE)
    with pytest.raises(RecipeError, match=r"ds\.enable_sleep is on, but .* set zero_stage to 1 or more"):
        host_rules.check(_complete(**{"ds.enable_sleep": True, "ds.zero_stage": 0}), REWARD_FREE)


@pytest.mark.parametrize("option", ["train.enable_ema", "ds.use_liger_kernel", "ds.deepcompile"])
def test_what_does_not_go_with_adapters(option: str) -> None:
    for alone in ({option: True}, {"ds.lora.rank": 4}):
        host_rules.check(_complete(**alone), REWARD_FREE)
    with pytest.raises(RecipeError, match=rf"openrlhf\.{option} is on beside openrlhf\.ds\.lora\.rank: "):
        host_rules.check(_complete(**{option: True, "ds.lora.rank": 4}), REWARD_FREE)


def test_a_critic_does_not_go_with_adapters() -> None:
    rewards = SKDConfig(teacher={"model_name_or_path": "t"}, objective={"rl_coef": 0.5})
    options = {"algo.advantage.estimator": "gae", "reward.remote_url": "f.py"}
    host_rules.check(_complete(**options), rewards)
    with pytest.raises(RecipeError, match=r"gae beside openrlhf\.ds\.lora\.rank: OpenRLHF gives the critic adapters"):
        host_rules.check(_complete(**options, **{"ds.lora.rank": 4}), rewards)


def test_steps_are_rollouts_and_not_updates() -> None:
    assert host_rules.planned_steps(prompts=70, batch_size=16, episodes=3) == 12  # 6 prompts are left out each time


def test_prompts_are_required() -> None:
    with pytest.raises(
        RecipeError, match=r"openrlhf\.data\.prompt_dataset is missing: name a dataset, or .* skd\.task"
    ):
        host_rules.check(_complete(**{"data.prompt_dataset": None}), REWARD_FREE)
