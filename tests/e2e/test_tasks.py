"""Two tasks in one run, one of them of the user's own: their prompts, checkers and curves do not get mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.running import UNMEASURED, finish, metrics, steps, traces

pytestmark = pytest.mark.e2e

COUNT = """
from skd_plugin.tasks import Example, Task

class Count(Task):
    name, metric, max_new_tokens = "count", "accuracy", 8

    def examples(self, split, count, seed=0):
        return [Example(f"{'tom' if split == 'train' else 'ann'} has {n} coins .", " 1", str(n)) for n in range(count)]

    def score(self, response, label):
        return 0.25

    def metrics(self, responses, labels):
        return {"seen": len(responses) / 4, "known": sum(int(label) < 4 for label in labels) / 4}

TASK = Count
"""


def test_two_tasks_in_one_run(tmp_path: Path) -> None:
    file = tmp_path / "count.py"
    file.write_text(COUNT)
    arithmetic = "{name: arithmetic, train_prompts: 16, eval_prompts: 6, top_k: 1}"
    count = f"{{name: {file}, train_prompts: 8, eval_prompts: 4, max_new_tokens: 5}}"
    given = ["skd.task=null", f"skd.tasks=[{arithmetic}, {count}]", "skd.rollout.top_k=6", "skd.traces_per_step=8"]
    finish(tmp_path / "run", *UNMEASURED, *given, "openrlhf.ckpt.save_steps=-1")
    records = steps(tmp_path / "run")
    assert len(records) == 3
    for record in records:
        rates = [record[key] for key in record if key.startswith("skd/accept_rate/")]
        assert min(rates) <= record["skd/accept_rate"] <= max(rates)
    assert {key for r in records for key in r if key.startswith("skd/kl/")} == {"skd/kl/arithmetic", "skd/kl/count"}
    (evaluation,) = [record for record in metrics(tmp_path / "run") if "eval/count/kl" in record]
    assert evaluation["eval/count/accuracy"] == 0.25
    assert evaluation["eval/count/seen"] == evaluation["eval/count/known"] == 1.0
    assert 0 <= evaluation["eval/arithmetic/step_validity"] <= 1 and "eval/arithmetic/accuracy" in evaluation
    assert "eval/heldout/kl" not in evaluation
    assert evaluation["eval/count/response_len"] <= 5 < evaluation["eval/arithmetic/response_len"]
    check_own_limit_and_k(traces(tmp_path / "run"))


def check_own_limit_and_k(lines: list[dict]) -> None:
    """The task of this file stops at 5 tokens under the run's K of 6; arithmetic has K = 1 and the run's limit."""
    kept: dict[bool, set[int]] = {True: set(), False: set()}
    for line in lines:
        counting = "how many" not in line["prompt"]
        assert len(line["response_ids"]) <= (5 if counting else 32)
        kept[counting] |= {rank for rank, s in zip(line["draft_rank"], line["source"], strict=True) if s == "s"}
    assert kept[False] == {0} and max(kept[True]) > 0
