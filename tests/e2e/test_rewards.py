"""Rewards beside distillation, through the host's own options: server, reward model, critic, agent; and a failure."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.running import RECIPE, UNMEASURED, finish, metrics, processes_with, start, steps, traces
from tests.waiting import GUARD_S

pytestmark = pytest.mark.e2e

SUM = re.compile(r"(\d+) ([+-]) (\d+) =(?=([^=]*))")  # and what the student wrote behind it
STUDENT = RECIPE.parent / "models" / "arithmetic" / "student"


class _Server(BaseHTTPRequestHandler):
    """Rewards by the length of the answer, so that the samples of a prompt differ."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (query,), (prompt,) = asked["query"], asked["prompts"]
        score = len(query[len(prompt) :]) % 7 / 7
        body = json.dumps({"rewards": score, "scores": score}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)
        self.server.asked.append(prompt)  # type: ignore[attr-defined]

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as found:
        found.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_server_groups_filtering_and_length_penalty(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    """With two engines, and two actors whose student ZeRO-3 has split: the engines must have the whole one."""
    finish(
        tmp_path,
        *UNMEASURED,
        "skd.task.train_prompts=64",
        "skd.objective.rl_coef={kind: linear, from: 0.5, to: 0.1, hold: 0}",
        f"openrlhf.reward.remote_url=http://127.0.0.1:{server.server_port}/score",
        "openrlhf.reward.overlong_buffer_len=8",
        "openrlhf.algo.advantage.estimator=group_norm",
        "openrlhf.algo.dynamic_filtering_enable=true",
        "openrlhf.algo.dynamic_filtering_range=[0.1,0.9]",
        "openrlhf.rollout.n_samples_per_prompt=4",
        "openrlhf.train.batch_size=8",  # four updates a step
        "openrlhf.vllm.num_engines=2",
        "openrlhf.actor.num_gpus_per_node=2",
        "openrlhf.ds.zero_stage=3",
    )
    trained = steps(tmp_path)
    assert trained and len(server.asked) > 32 * len(trained)  # type: ignore[attr-defined]
    for record in trained:
        assert record["rl/reward"] < 0.9 and 0 < record["rl/filter_pass_rate"] <= 1
        assert record["rl/own_frac"] == pytest.approx(record["skd/accept_rate"])
        assert isinstance(record["rl/loss"], float) and isinstance(record["skd/loss"], float)
        planned = 64 // 8  # a schedule goes by roll-outs, however many updates each has
        assert record["rl/coef"] == pytest.approx(0.5 - 0.4 * (record["step"] - 1) / planned)


def test_reward_model_critic_and_reference(tmp_path: Path) -> None:
    finish(
        tmp_path,
        *UNMEASURED,
        "skd.objective.rl_coef=0.5",
        "openrlhf.algo.advantage.estimator=gae",
        "openrlhf.algo.kl.init_coef=0.01",
        f"openrlhf.reward.model_name_or_path={STUDENT}",
        f"openrlhf.critic.model_name_or_path={STUDENT}",
    )
    assert len(steps(tmp_path)) == 3
    for record in steps(tmp_path):
        for name in ("rl/critic_loss", "rl/kl_to_reference", "rl/reward", "rl/loss", "skd/loss"):
            assert isinstance(record[name], float), name
    assert not any(key.startswith("eval/") for record in metrics(tmp_path) for key in record)


def test_agent_with_a_calculator_while_the_trainer_trains(tmp_path: Path) -> None:
    """Several turns by the recipe's agent: the calculator's words are in the context, but never in what is trained.
    The engine answers the next step's prompts meanwhile, and takes new weights in the middle of them.
    """
    recipe = RECIPE.with_name("quickstart-calculator.yaml")
    finish(
        tmp_path,
        *UNMEASURED,
        "skd.traces_per_step=32",
        "openrlhf.rollout.n_samples_per_prompt=4",
        "openrlhf.train.batch_size=32",
        "skd.rollout.max_new_tokens=96",
        "openrlhf.train.async_enable=true",
        "openrlhf.train.partial_rollout_enable=true",
        "openrlhf.actor.adam.lr=1e-5",  # how old a student is, is timing: its KL must not depend on that
        recipe=recipe,
    )
    assert [record["step"] for record in steps(tmp_path)] == [1, 2, 3]
    assert sorted(record["step"] for record in metrics(tmp_path) if "eval/arithmetic/kl" in record) == [3]
    for record in steps(tmp_path):
        first = record["step"] == 1  # later ones are of an older student, and its KL is another one
        assert record["skd/loss"] == pytest.approx(record["skd/kl"], rel=0.02 if first else 0.5)
        assert record["skd/staleness"] == 0 if first else 0 < record["skd/staleness"] <= 1
        assert record["rl/reward"] > 0.3  # the sums are right, whatever the student can calculate
    asked = [trace for trace in traces(tmp_path) if "=" in trace["response"]]
    assert len(asked) > 50
    for trace in asked:
        assert len(trace["source"]) == len(trace["response_ids"])
        for left, sign, right, behind in SUM.findall(trace["response"]):
            result = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert not behind.startswith(f" {result} ."), trace["response"]


@pytest.mark.soak  # which errors there are is in tests/contract/test_rewards.py, how one ends a run in test_faults.py
def test_a_reward_that_raises_ends_the_run(tmp_path: Path) -> None:
    broken = tmp_path / "broken_reward.py"
    broken.write_text("def reward_func(queries, prompts, labels):\n    raise KeyError('no such label')\n")
    folder = tmp_path / "run"
    process = start(folder, *UNMEASURED, "skd.objective.rl_coef=1", f"openrlhf.reward.remote_url={broken}")
    output, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1, output
    assert "The run failed: " in output and "no reward for the prompt" in output and "no such label" in output
    assert not processes_with(folder)
