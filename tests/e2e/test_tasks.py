"""Two tasks in one run, one of them of the user's own: their prompts, checkers and curves do not get mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_plugin.run_folder import RunFolder
from skd_plugin.tasks.label import Label
from tests.e2e.running import metrics, steps, traces

pytestmark = pytest.mark.e2e


def test_each_task_has_its_own_metrics(finished_run: tuple[Path, str]) -> None:
    folder, _ = finished_run
    for record in steps(folder):  # a task has no rate in a step that has only references of it
        rates = [value for key, value in record.items() if key.startswith("skd/accept_rate/") and value is not None]
        assert min(rates) <= record["skd/accept_rate"] <= max(rates)
    keys = {key for record in steps(folder) for key in record if key.startswith("skd/kl/")}
    assert keys == {"skd/kl/arithmetic", "skd/kl/count"}
    evaluations = [record for record in metrics(folder) if "eval/count/kl" in record]
    assert len(evaluations) == 4
    for evaluation in evaluations:
        assert evaluation["eval/count/accuracy"] == 0.25
        assert evaluation["eval/count/seen"] == evaluation["eval/count/known"] == 1.0
        assert 0 <= evaluation["eval/arithmetic/step_validity"] <= 1 and "eval/arithmetic/accuracy" in evaluation
        assert "eval/heldout/kl" not in evaluation
        assert evaluation["eval/count/response_len"] <= 5 < evaluation["eval/arithmetic/response_len"]


def test_the_teacher_of_one_task_reads_a_prompt_of_its_own(finished_run: tuple[Path, str]) -> None:
    """Which the run has compared with transformers' teacher on the same prompt, before its first update."""
    folder, _ = finished_run
    assert steps(folder)[0]["skd/teacher_gap"] < 1e-3
    references = {
        row["input"]: Label.parse(row["label"]).reference for row in RunFolder(folder).prompts("train").read()
    }
    seen = set()
    for line in traces(folder):
        told = "how many" in line["prompt"]
        expected = f"{references[line['prompt']]} {line['prompt']}" if told else line["prompt"]
        assert line["teacher_prompt"] == expected
        seen.add(told)
    assert seen == {True, False}


def test_each_task_has_its_own_limit_and_k(finished_run: tuple[Path, str]) -> None:
    """The counting task stops at 5 tokens under the run's K; arithmetic has K = 1 and the run's limit."""
    kept: dict[bool, set[int]] = {True: set(), False: set()}
    for line in traces(finished_run[0]):
        counting = "how many" not in line["prompt"]
        assert len(line["response_ids"]) <= (5 if counting else 32)
        kept[counting] |= {rank for rank, s in zip(line["draft_rank"], line["source"], strict=True) if s == "s"}
    assert kept[False] == {0} and max(kept[True]) > 0
