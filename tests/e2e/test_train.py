"""`skd train` as a user runs it: a process of its own, real Ray, vLLM and DeepSpeed, on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.running import (
    NUM_STEPS,
    RECIPE,
    UNMEASURED,
    metrics,
    processes_with,
    start,
    steps,
    traces,
    wait_for_step,
    wait_until_gone,
)
from tests.waiting import GUARD_S, wait_for

pytestmark = pytest.mark.e2e

SUMS = ("time/step", "time/rollout", "time/train")  # of the other `time/*`


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_run_folder_is_complete(finished_run: tuple[Path, str]):
    folder, output = finished_run
    trained = steps(folder)
    assert [record["step"] for record in trained] == list(range(1, NUM_STEPS + 1))
    for name in ("skd/accept_rate", "skd/replaced_frac", "skd/teacher_nll", "skd/draft_waste", "tokens_per_s"):
        assert all(isinstance(record[name], float) for record in trained), name
    assert all(record["skd/undrafted_frac"] == 0.0 for record in trained)
    for record in trained:
        parts = [value for name, value in record.items() if name.startswith("time/") and name not in SUMS]
        assert len(parts) > 15 and sum(parts) == pytest.approx(record["time/step"], rel=1e-3)
        assert record["time/rollout"] + record["time/train"] <= 1.02 * record["time/step"]
        assert all(
            record[f"time/{name}"] > 0 for name in ("draft", "verify", "sample", "record", "forward", "backward")
        )
    evaluations = [key for record in metrics(folder) for key in record if key.startswith("eval/")]
    assert evaluations.count("eval/arithmetic/accuracy") == 4
    assert evaluations.count("eval/arithmetic/teacher_accuracy") == 1
    for name in ("config.yaml", "host.log", "traces.jsonl", "model/config.json"):
        assert (folder / name).exists(), name
    assert list(folder.glob(f"tensorboard/{folder.name}/events.out.tfevents.*"))
    assert "acceptance" in output and "KL to teacher" in output


def test_traces_are_what_was_trained_on(finished_run):
    """The trainer's loss on the rollout equals the KL that the engine measured while sampling it."""
    folder, _ = finished_run
    assert {trace["step"] for trace in traces(folder)} == set(range(1, NUM_STEPS + 1))
    for trace in traces(folder):
        assert set(trace["source"]) <= {"s", "t", "r"}
        assert len(trace["source"]) == len(trace["response_ids"]) == len(trace["teacher_topk_ids"])
    for record in steps(folder):
        assert record["skd/loss"] == pytest.approx(record["skd/kl"], rel=0.02)


def test_saved_student_is_trained_and_loads(finished_run):
    folder, _ = finished_run
    before = weights(RECIPE.parent / "models" / "arithmetic" / "student")
    after = weights(folder / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.eos_token_id is not None


STRANGER = """
import ray

ray.init("{address}", logging_level="ERROR")
print("ran:", ray.get(ray.remote(lambda: "code of a stranger").remote()))
"""


def refuses_a_stranger(folder: Path) -> None:
    """Ray takes no work from a process that has not the run's token, whatever address it comes from."""
    ports = {
        connection.laddr.port
        for process in processes_with(folder, "gcs_server")
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ports, "no Ray was found"
    for port in ports:
        address = f"{ray.util.get_node_ip_address()}:{port}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        code = STRANGER.format(address=address)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=GUARD_S)
        assert done.returncode != 0 and "ran:" not in done.stdout, done.stdout
        assert "Failed to connect to Ray cluster" in done.stderr, done.stderr


def test_ctrl_c_ends_the_run_and_leaves_no_process(tmp_path):
    process = start(tmp_path, "skd.task.train_prompts=4000", *UNMEASURED)
    wait_for_step(tmp_path, 1, process)
    refuses_a_stranger(tmp_path)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 130, output
    assert "Stopped" in output
    assert not processes_with(tmp_path)


def test_a_killed_skd_takes_its_processes_with_it(tmp_path):
    """kill -9 of the command that the user started: it cannot clean up, so the host must notice, at whatever it is."""
    process = start(tmp_path, *UNMEASURED)
    wait_for(lambda: processes_with(tmp_path, "gcs_server"), "Ray of the run")
    process.kill()
    process.communicate()
    wait_until_gone(tmp_path)
