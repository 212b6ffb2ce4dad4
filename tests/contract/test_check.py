"""What `skd check` takes over from its hosts: how prompts are loaded and padded, and what its estimates assume."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer

from skd_plugin.check import memory_model
from skd_plugin.check.environment import LOGICAL_GPUS
from tests.contract.source import assert_parameters


def test_loading_of_prompts():
    from openrlhf.datasets.prompts_dataset import preprocess_data
    from openrlhf.datasets.utils import blending_datasets

    names = ["datasets", "probabilities", "strategy", "seed", "max_count", "stopping_strategy", "dataset_split"]
    assert_parameters(blending_datasets, names, "host/prompts.py")
    names = ["data", "input_template", "input_key", "label_key", "apply_chat_template"]
    assert_parameters(preprocess_data, names, "host/prompts.py")


def test_steps_are_counted_as_the_host_counts():
    from openrlhf.trainer.ppo_trainer import prepare_datasets

    source = inspect.getsource(prepare_datasets)
    for part in ("len(prompts_dataset)", "args.train.batch_size", "args.train.num_episodes", "args.train.max_epochs"):
        assert part in source, "see check/steps.py:check_steps"


def test_the_host_pads_with_the_end_token_where_there_is_no_other(tiny_pair):
    from openrlhf.utils.utils import get_tokenizer

    tokenizer = get_tokenizer(str(tiny_pair / "student"), None)
    assert tokenizer.pad_token == "<pad>"
    assert "tokenizer.pad_token = tokenizer.eos_token" in inspect.getsource(get_tokenizer)


def test_the_host_masks_by_length_and_not_by_id():
    """Otherwise a pad token that is also the end token would hide the ends of responses; see check/model_pair.py."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    def sample(ids: list[int]) -> Experience:
        sequences, ones = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
        return Experience(sequences=sequences, attention_mask=ones, action_mask=ones[:, 1:])

    pad_and_end = 2
    joined = Experience.concat_experiences(
        [sample([5, 6, pad_and_end]), sample([5, 6, 7, 8, pad_and_end])], pad_and_end
    )
    assert joined.attention_mask.sum(1).tolist() == [3, 5]
    assert joined.action_mask.sum(1).tolist() == [2, 4]


def test_vllm_stops_at_the_end_tokens_of_generation_config():
    from vllm import SamplingParams

    params = SamplingParams(stop_token_ids=[9])
    params.update_from_generation_config({"eos_token_id": [2, 7]}, 2)
    assert set(params.stop_token_ids) >= {7, 9}


def test_sizes_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from openrlhf.utils.deepspeed.deepspeed_utils import get_train_ds_config

    zero = DeepSpeedZeroConfig(**get_train_ds_config(offload=False, stage=3)["zero_optimization"])
    assert zero.reduce_bucket_size == zero.allgather_bucket_size == memory_model.BUCKET_PARAMETERS
    assert zero.max_live_parameters == memory_model.GATHERED_PARAMETERS


def test_number_of_logical_gpus_on_a_cpu():
    from skd_plugin.host.bind import ray_options

    assert ray_options(SimpleNamespace(cpu=True), own_ray=True)["num_gpus"] == LOGICAL_GPUS


def test_tokenizers_have_the_lists_of_special_tokens(tiny_pair):
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "student")
    assert "</s>" in tokenizer.all_special_tokens and isinstance(tokenizer.get_added_vocab(), dict)
