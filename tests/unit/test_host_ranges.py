"""Numbers of OpenRLHF's and vLLM's options: which can be, and that each numeric option has its range."""

from __future__ import annotations

import math

import pytest

from skd_plugin.config.host_options import host_defaults, host_parser
from skd_plugin.config.host_ranges import RANGES, Range, check_ranges
from skd_plugin.config.vllm_options import COUNTS, RESERVED, SPREAD, engine_arguments
from skd_plugin.errors import RecipeError

NUMERIC = {action.dest for action in host_parser()._actions if action.type in (int, float)}


def test_every_number_of_the_host_has_its_range() -> None:
    assert set(RANGES) == NUMERIC


def test_the_hosts_own_values_are_in_their_ranges() -> None:
    check_ranges(host_defaults())


@pytest.mark.parametrize("name", sorted(RANGES))
def test_no_option_is_nan(name: str) -> None:
    assert not RANGES[name].holds(math.nan) and not RANGES[name].holds(-math.inf)


@pytest.mark.parametrize(
    ("allowed", "good", "bad", "words"),
    [
        (Range(ge=1), (1, 5), (0, -1, math.inf), "1 or more"),
        (Range(gt=0, le=1), (1e-9, 1), (0, 1.1), "above 0 and at most 1"),
        (Range(ge=1, off=-1), (-1, 1), (0, -2), "-1, or 1 or more"),
        (Range(gt=0, off=math.inf), (math.inf, 2), (0, -math.inf), "inf, or above 0"),
        (Range(ge=0, lt=1), ([0, 0.5],), ([0, 1], [math.nan, 0]), "0 or more and below 1"),
        (Range(rising=True), ([-1, 1], [0, 0]), ([1, 0],), "a finite number, the first not above the second"),
    ],
)
def test_ranges(allowed: Range, good: tuple, bad: tuple, words: str) -> None:
    assert all(map(allowed.holds, good)) and not any(map(allowed.holds, bad)) and allowed.words == words


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("openrlhf.actor.adam.lr=-1e-6", r"openrlhf\.actor\.adam\.lr is -1e-06, but must be 0 or more"),
        ("openrlhf.actor.adam.lr=.nan", r"actor\.adam\.lr is nan, but must be 0 or more"),
        ("openrlhf.train.micro_batch_size=0", r"train\.micro_batch_size is 0, but must be 1 or more"),
        ("openrlhf.train.num_episodes=0", r"train\.num_episodes is 0, but must be 1 or more"),
        ("openrlhf.eval.steps=0", r"eval\.steps is 0, but must be -1, or 1 or more"),
        ("openrlhf.vllm.num_engines=0", r"vllm\.num_engines is 0, but must be 1 or more"),
        ("openrlhf.actor.num_gpus_per_node=0", r"actor\.num_gpus_per_node is 0, but must be 1 or more"),
        ("openrlhf.ds.zero_stage=9", r"ds\.zero_stage is 9, but must be 0 or more and at most 3"),
        (
            "openrlhf.vllm.gpu_memory_utilization=7.0",
            r"gpu_memory_utilization is 7\.0, but must be above 0",
        ),
        ("openrlhf.actor.adam.betas=[0.9, 1.5]", r"betas is 0\.9 1\.5, but must be 0 or more and below 1"),
        ("openrlhf.data.max_len=0", r"data\.max_len is 0, but must be 3 or more"),
        ("skd.vllm.gpu_memory_utilization=7.0", r"skd\.vllm\.gpu_memory_utilization is 7\.0, but must be above 0"),
        ("skd.vllm.max_num_seq=8", r"skd\.vllm: unknown key 'max_num_seq'; did you mean 'max_num_seqs'\?"),
        ("skd.vllm.max_num_seqs=0", r"skd\.vllm\.max_num_seqs is 0, but must be a whole number, 1 or more"),
        ("skd.vllm.max_num_seqs=true", r"skd\.vllm\.max_num_seqs is True, but must be a whole number"),
        *(
            (
                f"skd.vllm.{name}={'true' if allowed is False else 2}",
                rf"skd\.vllm\.{name} is .*, but must be {allowed}: ",
            )
            for name, (allowed, _) in SPREAD.items()
        ),
        ("skd.vllm.max_model_len=64", r"skd\.vllm\.max_model_len is 64, but .*data\.max_len = \d+ .* needs \d+"),
    ],
)
def test_a_number_that_cannot_be(quickstart, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quickstart(override)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_an_engine_argument_that_is_ours(quickstart, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"skd\.vllm\.{name} cannot be set, as the engine would not be SKD's"):
        quickstart(f"skd.vllm.{name}=x")


def test_engine_arguments_are_vllms() -> None:
    """As its own class has them, which costs ten seconds to import."""
    assert (
        COUNTS | set(RESERVED) | set(SPREAD) | {"seed", "dtype", "download_dir", "enforce_eager"} <= engine_arguments()
    )
    assert len(engine_arguments()) > 100


def test_values_are_of_the_types_of_the_hosts_parser(quickstart) -> None:
    """YAML 1.1 takes 1e-6 for a text, and people put numbers in quotation marks; null is OpenRLHF's own value."""
    given = [
        "actor.adam.lr=1e-6",
        "train.batch_size='2'",
        "data.input_template='--help {}'",
        "rollout.batch_size=null",
    ]
    run = quickstart(*(f"openrlhf.{item}" for item in given), "skd.task.train_prompts=1024")
    assert run.host["actor.adam.lr"] == 1e-6 and run.host["train.batch_size"] == 2
    assert "rollout.batch_size" not in run.host
    parsed = vars(host_parser().parse_args(run.host_argv()))
    assert parsed["data.input_template"] == "--help {}" and parsed["rollout.batch_size"] == 1024
