"""An engine's arguments: one way from a recipe to them, so that train, rollout, eval and check have the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skd_plugin.config.teacher import ONLY
from skd_plugin.engine.arguments import CPU_CACHE_BYTES, EngineSpec
from tests.specs import make_spec

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
TEACHER, STUDENT = (str(RECIPE.parent / "models" / "arithmetic" / name) for name in ("teacher", "student"))
OVERRIDES = [
    "skd.task.train_prompts=64",
    "skd.task.eval_prompts=4",
    "skd.loss.vocabulary=full",
    "skd.loss.temperature=2",
    "skd.vllm={max_num_seqs: 8, seed: 5}",
    "openrlhf.train.seed=7",
    "openrlhf.vllm.num_engines=2",
    "openrlhf.actor.num_gpus_per_node=1",
    "openrlhf.vllm.gpu_memory_utilization=0.3",
]


class Started(Exception):
    """An engine would start here."""


@pytest.fixture(params=["cpu", "cuda"])
def overrides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("RAY_ADDRESS", "a cluster with GPUs")
    return [*OVERRIDES, f"skd.device={request.param}"]


def trained(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """EngineArgs of each engine of a run, from what OpenRLHF hands its actors."""
    from skd_plugin.host import on_cpu

    on_cpu.install()
    import openrlhf.trainer.ray.vllm_engine as vllm_engine

    from skd_plugin.config.host_options import hierarchize, host_parser
    from skd_plugin.host import rollout_actor
    from skd_plugin.host.bind import rollout_class
    from skd_plugin.prepare.load_run import load_run

    run = load_run(RECIPE, overrides)
    args = hierarchize(host_parser().parse_args(run.host_argv()))
    handed: list[dict[str, Any]] = []
    actor = SimpleNamespace(remote=lambda **keywords: handed.append(keywords))
    monkeypatch.setattr(vllm_engine, "RolloutRayActor", SimpleNamespace(options=lambda **_: actor))
    vllm_engine.create_vllm_engines(
        args.vllm.num_engines,
        args.vllm.tensor_parallel_size,
        args.actor.model_name_or_path,
        args.train.seed,
        args.train.full_determinism_enable,
        args.vllm.enable_prefix_caching,
        args.vllm.enforce_eager,
        args.data.max_len,
        SimpleNamespace(),
        args.vllm.gpu_memory_utilization,
        args.vllm.enable_sleep,
        "processed_logprobs",
        agent_func_path=args.train.agent_func_path,
        remote_rm_url=args.reward.remote_url,
    )

    async def start(self: Any, **keywords: Any) -> None:
        self.started = keywords
        raise Started

    monkeypatch.setattr(rollout_actor.HostRollout, "__init__", start)
    monkeypatch.setattr(rollout_actor, "set_up_skd", lambda: None)
    for keywords in handed:
        engine = object.__new__(rollout_class(run, ONLY))
        with pytest.raises(Started):
            asyncio.run(engine.__init__(**keywords))
        of_the_actor = ("num_gpus", "bundle_indices", "agent_func_path", "mm_pad_token_ids", "full_determinism")
        yield {k: v for k, v in engine.started.items() if k not in (*of_the_actor, "remote_rm_url")}


def rolled_out(overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineSpec:
    from skd_plugin import rollout_command
    from skd_plugin.engine import offline

    asked: list[EngineSpec] = []

    def start(spec: EngineSpec) -> None:
        asked.append(spec)
        raise Started

    monkeypatch.setattr(offline, "SKDEngine", start)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [4, 5]}\n')
    with pytest.raises(Started):
        rollout_command.run_rollout(str(RECIPE), overrides, str(prompts), 1, str(tmp_path / "out.jsonl"), raw=False)
    return asked[0]


def evaluated(overrides: list[str]) -> EngineSpec:
    from skd_plugin.evaluate.command import job_of
    from skd_plugin.evaluate.plan import make_plan

    plan = make_plan(str(RECIPE), overrides, [], ["all"])
    return job_of(plan, plan.students[0], plan.held_out[0]).spec


def checked(overrides: list[str]) -> EngineSpec:
    from skd_plugin.check.self_test import make_trial
    from skd_plugin.check.subject import read_subject

    subject = read_subject(str(RECIPE), overrides)
    assert subject.run is not None, subject.error
    return make_trial(TEACHER, subject.run.skd, subject.options, [[4, 5]], cpu=subject.run.cpu).spec


# What training alone says: where OpenRLHF places an engine, and who receives the weights.
TRAINING = {
    "worker_extension_cls": "skd_plugin.host.weight_sync.StudentWeights",
    "distributed_executor_backend": "uni",
}


def test_commands_start_the_engine_of_the_run(overrides, monkeypatch, tmp_path) -> None:
    first, second = trained(overrides, monkeypatch)
    assert first == second  # here skd.vllm has the last word on their seeds
    on_a_gpu = overrides[-1] == "skd.device=cuda"
    assert first.pop("enable_sleep_mode", None) is (False if on_a_gpu else None)  # vLLM refuses it on a CPU
    rollout = rolled_out(overrides, monkeypatch, tmp_path).arguments()
    config = {
        "skd_teacher_top_k": 32,
        "skd_student_top_k": 0,
        "skd_loss_temperature": 2.0,
        "skd_teacher_hidden": True,
        "skd_teacher_moves": False,
        "skd_draft_len_auto": False,
        "skd_end_ids": [],
        "skd_kernels": "auto",
    }
    assert first["additional_config"] == config
    assert rollout == {
        **{key: value for key, value in first.items() if key not in TRAINING},
        "additional_config": config | {"skd_teacher_hidden": False},  # nothing would be trained by it
    }
    assert {key: first[key] for key in TRAINING} == TRAINING
    assert evaluated(overrides).arguments() == {
        **rollout,
        "additional_config": {
            "skd_teacher_top_k": 1,
            "skd_student_top_k": 0,
            "skd_loss_temperature": 1.0,
            "skd_teacher_hidden": False,
            "skd_teacher_moves": False,
            "skd_draft_len_auto": False,
            "skd_end_ids": [],
            "skd_kernels": "auto",
        },
    }
    assert checked(overrides).arguments() == {
        **rollout,
        "speculative_config": rollout["speculative_config"] | {"model": TEACHER},
        "additional_config": {**config, "skd_loss_temperature": 1.0, "skd_teacher_hidden": False},
    }


def test_arguments_of_a_recipe(overrides, monkeypatch) -> None:
    first, second = trained([*overrides, "skd.vllm={max_num_seqs: 8}"], monkeypatch)
    assert (first.pop("seed"), second.pop("seed")) == (7, 8)  # each engine its own
    assert first == second
    assert (first["model"], first["speculative_config"]["model"]) == (TEACHER, STUDENT)
    assert first["max_num_seqs"] == 8 and not first["trust_remote_code"] and first["tensor_parallel_size"] == 1
    assert first["max_model_len"] == 176 + 2 * 4 + 1 and not first["async_scheduling"]
    assert not {"logprobs_mode", "max_logprobs"} & first.keys()
    if overrides[-1] == "skd.device=cpu":
        assert (first["dtype"], first["enforce_eager"]) == ("float32", True)
        assert first["kv_cache_memory_bytes"] == CPU_CACHE_BYTES and "gpu_memory_utilization" not in first
    else:
        assert (first["dtype"], first["enforce_eager"]) == ("bfloat16", False)
        assert first["gpu_memory_utilization"] == 0.3 and "kv_cache_memory_bytes" not in first


def test_the_prefix_cache_can_be_turned_off(overrides, monkeypatch) -> None:
    assert all(engine["enable_prefix_caching"] for engine in trained(overrides, monkeypatch))
    off = [*overrides, "openrlhf.vllm.enable_prefix_caching=false"]
    assert not any(engine["enable_prefix_caching"] for engine in trained(off, monkeypatch))


@pytest.mark.parametrize("cpu", [True, False])
def test_options_of_the_user_win_over_all_others(cpu: bool) -> None:
    own = {"dtype": "float16", "seed": 1, "gpu_memory_utilization": 0.5, "max_num_batched_tokens": 64}
    spec = make_spec(cpu=cpu, openrlhf={"seed": 2, "gpu_memory_utilization": 0.9, "enforce_eager": False}, options=own)
    for arguments in (spec.arguments({"seed": 3}), spec.plain_arguments()):
        assert {key: arguments[key] for key in own} == own
        assert arguments["enforce_eager"] == cpu
    assert make_spec(openrlhf={"seed": 2}).arguments({"seed": 3})["seed"] == 3


@pytest.mark.parametrize(("cpu", "executor"), [(True, "mp"), (False, "ray")])
def test_an_engine_of_several_ranks_is_rays_on_gpus_alone(cpu: bool, executor: str) -> None:
    spec = make_spec(cpu=cpu, openrlhf={"tensor_parallel_size": 2})
    given = {"distributed_executor_backend": "ray"}  # as OpenRLHF's create_vllm_engines has it
    assert spec.arguments(given)["distributed_executor_backend"] == executor
    assert spec.arguments(given | {"distributed_executor_backend": "uni"})["distributed_executor_backend"] == "uni"


def test_the_student_alone_reads_whole_prompts() -> None:
    arguments = make_spec(max_len=20000).plain_arguments()
    assert (arguments["model"], arguments["max_model_len"]) == ("student", 20000)
    assert arguments["max_num_batched_tokens"] == 20000 and not arguments["enable_chunked_prefill"]
    assert "speculative_config" not in arguments and "worker_cls" not in arguments


def test_what_rounds_weights_is_the_teachers_alone() -> None:
    rounding = {"quantization": "fp8", "quantization_config": {"a": 1}}
    spec = make_spec(options=rounding | {"max_num_seqs": 8})
    assert rounding.items() <= spec.arguments().items()
    assert not rounding.keys() & (spec.arguments()["speculative_config"].keys() | spec.plain_arguments().keys())
    assert spec.plain_arguments()["max_num_seqs"] == 8


def test_experts_of_a_student_stay_as_new_weights_find_them() -> None:
    """On newer GPUs vLLM would take kernels for which it shuffles the weights of experts after they are loaded."""
    drafts = {cpu: make_spec(cpu=cpu).arguments()["speculative_config"] for cpu in (True, False)}
    assert drafts[False]["moe_backend"] == "triton" and "moe_backend" not in drafts[True]


def test_a_spec_survives_json() -> None:
    import json

    spec = make_spec(options={"a": [1]}, openrlhf={"b": None})
    assert EngineSpec(**json.loads(json.dumps(asdict(spec)))) == spec
