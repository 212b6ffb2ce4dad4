"""`skd train` as a user runs it: a process of its own, real Ray, vLLM and DeepSpeed, on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.e2e

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL = [
    "skd.task.train_prompts=24",
    "skd.task.eval_prompts=8",
    "skd.rollout.max_new_tokens=32",
    "openrlhf.rollout.batch_size=8",
    "openrlhf.rollout.micro_batch_size=8",
    "openrlhf.train.batch_size=8",
    "openrlhf.train.micro_batch_size=4",
    "openrlhf.ckpt.save_steps=1",
]
START_LIMIT_S = 400
END_LIMIT_S = 240  # a guard against a hang, wide enough for a busy machine


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "skd_plugin.cli", "train", str(RECIPE), *SMALL, f"skd.run_dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not any("skd/loss" in record and record["step"] >= step for record in metrics(folder)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no step {step} after {START_LIMIT_S} s"
        time.sleep(0.2)


def processes_with(folder: Path) -> list[psutil.Process]:
    """Processes of the run, found by the id that each inherits; it begins with the run folder."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SKD_RUN_ID", "").startswith(str(folder)):
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run")
    process = start(folder)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return folder, output


def test_run_folder_is_complete(finished_run):
    folder, output = finished_run
    steps = [record for record in metrics(folder) if "skd/loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    for name in ("skd/accept_rate", "skd/replaced_frac", "skd/teacher_nll", "skd/draft_waste", "tokens_per_s"):
        assert all(isinstance(record[name], float) for record in steps), name
    assert all(record["skd/undrafted_frac"] == 0.0 for record in steps)
    evaluations = [key for record in metrics(folder) for key in record if key.startswith("eval/")]
    assert evaluations.count("eval/arithmetic/accuracy") == 2
    assert evaluations.count("eval/arithmetic/teacher_accuracy") == 1
    for name in ("config.yaml", "host.log", "traces.jsonl", "model/config.json"):
        assert (folder / name).exists(), name
    assert list(folder.glob("tensorboard/events.out.tfevents.*"))
    assert "acceptance" in output and "KL to teacher" in output


def test_traces_are_what_was_trained_on(finished_run):
    """The trainer's loss on the rollout equals the KL that the engine measured while sampling it."""
    folder, _ = finished_run
    traces = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    assert {trace["step"] for trace in traces} == {1, 2, 3}
    for trace in traces:
        assert set(trace["source"]) <= {"s", "t"}
        assert len(trace["source"]) == len(trace["response_ids"]) == len(trace["teacher_topk_ids"])
    for record in metrics(folder):
        if "skd/loss" in record:
            assert record["skd/loss"] == pytest.approx(record["skd/kl"], rel=0.02)


def test_saved_student_is_trained_and_loads(finished_run):
    folder, _ = finished_run
    before = weights(RECIPE.parent / "models" / "arithmetic" / "student")
    after = weights(folder / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.eos_token_id is not None


def test_a_dead_engine_ends_the_run_with_one_error(tmp_path):
    process = start(tmp_path, "skd.task.train_prompts=4000", "skd.eval.teacher=false", "skd.eval.at_start=false")
    wait_for_step(tmp_path, 2, process)
    engine = next(p for p in processes_with(tmp_path) if "EngineCore" in " ".join(p.cmdline()) + p.name())
    engine.kill()
    output, _ = process.communicate(timeout=END_LIMIT_S)
    assert process.returncode == 1, output
    assert "The run failed:" in output and "host.log" in output
    assert not processes_with(tmp_path)
    latest = (tmp_path / "checkpoints" / "_actor" / "latest").read_text()
    assert list((tmp_path / "checkpoints" / "_actor" / latest).glob("*model_states.pt"))


def test_ctrl_c_ends_the_run_and_leaves_no_process(tmp_path):
    process = start(tmp_path, "skd.task.train_prompts=4000", "skd.eval.teacher=false", "skd.eval.at_start=false")
    wait_for_step(tmp_path, 1, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=END_LIMIT_S)
    assert process.returncode == 130, output
    assert "Stopped" in output
    assert not processes_with(tmp_path)


def test_a_killed_skd_takes_its_processes_with_it(tmp_path):
    """kill -9 of the command that the user started: it cannot clean up, so the host must notice."""
    process = start(tmp_path, "skd.task.train_prompts=4000", "skd.eval.teacher=false", "skd.eval.at_start=false")
    wait_for_step(tmp_path, 1, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while processes_with(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not processes_with(tmp_path)
