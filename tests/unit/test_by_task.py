"""Metrics of each task of a run of several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from skd_plugin.core.metrics import figures_of
from skd_plugin.host.by_task import grouped, rollout_by_task, scores, sources
from skd_plugin.report.curves import metrics_of
from skd_plugin.report.run_record import read_runs
from skd_plugin.tasks import TASKS
from skd_plugin.tasks.label import Label
from tests.run_folder import write_run
from tests.unit.test_metrics import KEPT, SWAPPED, make_trace


def test_sources_of_prompts() -> None:
    train = SimpleNamespace(prompts=["a", "b"], datasources=["gsm8k", "default"])
    held_out = SimpleNamespace(prompts=["c"], datasources=["math500"])
    assert sources(train, held_out) == {"a": "gsm8k", "b": "heldout", "c": "math500"}
    assert sources(train, None) == {"a": "gsm8k", "b": "heldout"}


def test_grouped_keeps_the_order_of_the_items() -> None:
    assert grouped([1, 2, 3, 4], ["b", "a", "b", "a"]) == {"a": [2, 4], "b": [1, 3]}


def test_rates_of_two_tasks() -> None:
    traces = [make_trace([KEPT, SWAPPED], kl=1.0), make_trace([KEPT], kl=3.0), make_trace([SWAPPED, SWAPPED], kl=2.0)]
    assert rollout_by_task([figures_of(trace, 2) for trace in traces], ["x", "y", "x"]) == pytest.approx(
        {
            "skd/accept_rate/x": 1 / 4, "skd/kl/x": 1.5, "skd/response_len/x": 2,
            "skd/accept_rate/y": 1, "skd/kl/y": 3, "skd/response_len/y": 1,
        }
    )  # fmt: skip


def test_scores_are_the_tasks_own() -> None:
    example, other = TASKS["summary"]().examples("test", 2)
    labels = [Label(e.reference, "summary", e.label, "</s>").to_json() for e in (example, other)]
    metrics = scores([1.0, 0.5], [example.reference, ""], labels, by_checker=True)
    assert metrics == {"rouge_l": 0.75, "rouge_1": 0.5, "rouge_2": 0.5, "exact": 0.5, "fact_recall": 0.5}


def test_rewards_of_the_users_are_not_called_by_the_tasks_metric() -> None:
    label = Label("r", "summary", "{}", "</s>").to_json()
    assert scores([3.0, 1.0], ["", ""], [label] * 2, by_checker=False) == {"accuracy": 2.0}
    assert scores([1.0], ["x"], ["#### 72"], by_checker=True) == {"accuracy": 1.0}


def test_task_without_further_metrics(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    file.write_text(
        "class TASK:\n    name, metric, max_new_tokens = 'bare', 'accuracy', 3\n"
        "    def examples(self, split, count, seed=0): ...\n    def score(self, response, label): ...\n"
    )
    label = Label("1", str(file), "1").to_json()
    assert Label.parse(label).checker().name == "bare"
    assert scores([0.25], ["1"], [label], by_checker=True) == {"accuracy": 0.25}


@pytest.mark.parametrize("label", [None, "", "72", "[1]", '{"answer": 1}', "{"])
def test_labels_of_no_task(label: str | None) -> None:
    assert Label.parse(label).checker() is None


def test_report_names_the_curves_of_a_task(tmp_path: Path) -> None:
    lines = [{"step": 1, "skd/accept_rate": 0.5, "skd/accept_rate/gsm8k": 0.25, "skd/loss": 1.0}]
    lines += [{"step": 1, "eval/flores/chrf": 0.5, "eval/flores/bleu": 0.1}]
    metrics = metrics_of(read_runs([write_run(tmp_path / "run", metrics=lines)]))
    shown = {metric.name: metric for metric in metrics}
    assert shown["skd/accept_rate/gsm8k"].title == "Acceptance (gsm8k)" and shown["skd/accept_rate/gsm8k"].percent
    assert shown["eval/flores/chrf"].title == "chrF" and shown["eval/flores/chrf"].percent
    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names)) and names.index("skd/accept_rate/gsm8k") == names.index("skd/accept_rate") + 1
