"""With the policy term alone our trainer is the host's: the same rollouts give the same losses, gradients, weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest

VARIANTS = {
    "ppo, token mean": {},
    "ppo, sequence mean": {"actor.loss_agg_mode": "seq-mean-token-mean"},
    "gspo": {"actor.policy_loss_type": "gspo"},
    "dual clip, corrected": {"actor.dual_clip": 3.0, "algo.advantage.is_correction_level": "token"},
    "kl loss": {"algo.kl.use_loss": True, "algo.kl.init_coef": 0.1, "algo.kl.estimator": "k2"},
}
ESTIMATORS = ["group_norm", "rloo", "reinforce_baseline", "dr_grpo"]
STEPS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the host's own trainer and ours did, case by case."""
    folder = tmp_path_factory.mktemp("parity")
    with socket.socket() as first, socket.socket() as second:
        ports = [free.bind(("", 0)) or free.getsockname()[1] for free in (first, second)]
    kinds = ("host", "skd")
    with ThreadPoolExecutor() as both:
        return dict(zip(kinds, both.map(_train, kinds, ports, repeat(folder)), strict=True))


def _train(kind: str, port: int, folder: Path) -> dict:
    env = {**os.environ, "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.contract.parity_run", kind, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{kind}.json").read_text())


@pytest.mark.parametrize("case", [*VARIANTS, *ESTIMATORS])
def test_policy_term_alone_is_the_host(trained: dict[str, dict], case: str) -> None:
    theirs, ours = trained["host"][case], trained["skd"][case]
    assert len(theirs["steps"]) == STEPS
    for step, (wanted, found) in enumerate(zip(theirs["steps"], ours["steps"], strict=True)):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-7), step
        assert found["clip_ratio"] == pytest.approx(wanted["clip_ratio"], rel=1e-5, abs=1e-7), step
        assert found["gradient_norms"] == pytest.approx(wanted["gradient_norms"], rel=1e-4, abs=1e-8), step
        assert max(found["gradient_norms"]) > 0
    assert ours["weights"] == pytest.approx(theirs["weights"], rel=1e-5, abs=1e-7)
    assert any(step["clip_ratio"] > 0 for step in theirs["steps"]), (
        "the second epoch must leave the first one's policy"
    )
