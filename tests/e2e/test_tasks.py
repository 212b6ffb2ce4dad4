"""Two tasks in one run, one of them of the user's own: their prompts, checkers and curves do not get mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.running import UNMEASURED, finish, metrics, steps

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
    tasks = "[{name: arithmetic, train_prompts: 16, eval_prompts: 6}, {name: FILE, train_prompts: 8, eval_prompts: 4}]"
    given = ["skd.task=null", "skd.tasks=" + tasks.replace("FILE", str(file))]
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
