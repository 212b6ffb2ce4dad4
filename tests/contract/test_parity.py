"""With the policy term alone our trainer is the host's: the same rollouts give the same losses, gradients, weights."""

from __future__ import annotations

import json

import pytest

from tests.contract.ranks import run_ranks

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
    kinds = ("host", "skd")
    run_ranks("parity_run", {folder / kind: (1, [kind]) for kind in kinds})
    return {kind: json.loads((folder / kind / "parity.json").read_text()) for kind in kinds}


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
