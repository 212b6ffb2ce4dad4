"""The self-test of `skd check` on the arithmetic teacher: it passes, and each kind of sabotage makes it fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from skd_plugin import cli
from skd_plugin.check.self_test import judge, judge_pair
from skd_plugin.check.self_test_process import Drawn, Trial, compare, sample
from skd_plugin.core import gates
from skd_plugin.engine.offline import SKDEngine
from tests.specs import make_spec

pytestmark = pytest.mark.engine

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
MODELS = RECIPE.parent / "models" / "arithmetic"
TEACHER, STUDENT = str(MODELS / "teacher"), str(MODELS / "student")


@pytest.fixture(scope="module")
def trial() -> Trial:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    stories = [
        f"{who} has {n} coins . {who} finds {n + 8} . {who} sells 9 . how many coins ?"
        for who, n in (("tom", 47), ("ned", 20), ("tom", 61))
    ]
    spec = make_spec(
        teacher=TEACHER,
        student=TEACHER,
        draft_len=2,
        max_len=176,
        teacher_top_k=32,
        options={"kv_cache_memory_bytes": 64 << 20},
    )
    return Trial(spec, prompts=tokenizer(stories, add_special_tokens=False).input_ids, max_new_tokens=32)


def with_models(trial: Trial, **models: str) -> Trial:
    return replace(trial, spec=replace(trial.spec, **models))


@pytest.fixture(scope="module")
def teacher_twice(trial: Trial) -> SKDEngine:
    return SKDEngine(trial.spec)


@pytest.fixture(scope="module")
def drawn(teacher_twice: SKDEngine, trial: Trial) -> Drawn:
    return sample(teacher_twice, trial)


def levels(trial: Trial, drawn: Drawn) -> list[str]:
    dtype = trial.spec.arguments()["dtype"]
    found = compare(trial, drawn, dtype)
    return [finding.level for finding in judge(found, dtype, drawn.kept_by_a_shut_gate)]


def test_the_teacher_as_its_own_student(trial, drawn):
    assert levels(trial, drawn) == ["ok", "ok", "ok"]
    assert drawn.description["sampler"] == "SKDSampler"
    assert sum(map(len, drawn.traces)) > 30


def test_transformers_with_other_weights(trial, drawn):
    """The student's weights stand for a teacher that one of the two libraries loads wrongly."""
    assert levels(with_models(trial, teacher=STUDENT), drawn)[1:] == ["failed", "warning"]


def test_a_trace_that_lies(trial, drawn):
    traces = [replace(trace, teacher_topk_logp=trace.teacher_topk_logp * 0.9) for trace in drawn.traces]
    assert levels(trial, replace(drawn, traces=traces))[1] == "failed"


def test_a_student_that_is_not_the_teacher(trial):
    pair = with_models(trial, student=STUDENT)
    drawn = sample(SKDEngine(pair.spec), trial)
    assert levels(trial, drawn)[0] == "failed"
    dtype = pair.spec.arguments()["dtype"]
    assert judge_pair(compare(pair, drawn, dtype), dtype).level == "ok"
    assert judge_pair(compare(trial, drawn, dtype), dtype).level == "failed"  # transformers has another student


def test_a_gate_that_keeps_nothing(trial, teacher_twice, monkeypatch):
    sabotage(monkeypatch, lambda proposals: torch.zeros_like(proposals.draft_N, dtype=torch.bool))
    assert levels(trial, sample(teacher_twice, trial))[0] == "failed"


def test_a_gate_that_keeps_everything(trial, teacher_twice, monkeypatch):
    sabotage(monkeypatch, lambda proposals: torch.ones_like(proposals.draft_N, dtype=torch.bool))
    assert levels(trial, sample(teacher_twice, trial))[0] == "failed"


def sabotage(monkeypatch: pytest.MonkeyPatch, keep) -> None:
    monkeypatch.setitem(gates.GATES, "top_k", replace(gates.GATES["top_k"], keep=keep))


def test_the_command_starts_it(capsys, monkeypatch, tmp_path):
    """In processes of its own, from the recipe."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    small = ["skd.task.train_prompts=64", "skd.task.eval_prompts=4"]
    assert cli.main(["check", str(RECIPE), *small]) == 0
    output = capsys.readouterr().out
    assert "SKDSampler and SKDDrafter are in place" in output and "self-test: loss" in output
    assert "in one engine, against transformers: log p" in output
    assert "SKDScheduler" in output and not list(tmp_path.glob("skd-check-*"))


def test_an_engine_that_does_not_start_is_a_failure_with_its_log(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    small = ["skd.task.train_prompts=64", "skd.task.eval_prompts=4", "skd.vllm={quantization: nonsense}"]
    assert cli.main(["check", str(RECIPE), *small]) == 1
    (log,) = tmp_path.rglob("self-test.log")
    output = "".join(capsys.readouterr().out.split())  # the table breaks long words
    assert "failed:" in output and "theengine" in output and str(log) in output and "nonsense" in output
