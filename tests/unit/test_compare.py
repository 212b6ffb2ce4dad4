"""scripts/compare: the plan, what is done, the rows and the page. A session of runs is started by hand (results/)."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import collect
import differences
import execute
import figures
import finished as after
import page
import pytest
import ray
import session
import yaml
from interval import Interval, detectable, holm, p_value
from plan import ROOT as REPOSITORY
from plan import Finished, load_plan
from scipy.stats import ttest_rel

from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import load_run

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "recipes" / "compare" / "plan.yaml"


@pytest.fixture(scope="module")
def plan():
    return load_plan(PLAN)


def test_runs_of_the_committed_plan(plan):
    """Each once; a seed's runs share its prompts; the ends of the sweep are the runs of the comparison."""
    runs = plan.runs()
    assert REPOSITORY == ROOT and len({run.name for run in runs}) == len(runs)
    in_cells = len(plan.seeds) * len(plan.comparison.cells) * len(plan.comparison.methods)
    extra = set(plan.sweep.methods.values()) - set(plan.comparison.methods)
    assert len(runs) == in_cells + len(plan.sweep.seeds) * len(plan.sweep.cells) * len(extra)
    for run in runs:
        assert {f"{key}={run.seed}" for key in ("skd.task.seed", "skd.rollout.seed", "openrlhf.train.seed")} <= set(
            run.overrides
        )


@pytest.mark.parametrize("cell", ["arithmetic/cold", "arithmetic/warm", "translation/cold", "translation/warm"])
def test_every_method_is_a_recipe(plan, cell, tmp_path):
    methods = dict.fromkeys([*plan.comparison.methods, *plan.sweep.methods.values()])
    few = ["skd.task.eval_prompts=8", f"skd.run_dir={tmp_path}"]
    loads = {m: load_run(r.recipe, [*r.overrides, *few]) for m in methods if (r := plan.run(cell, m, 1))}
    assert loads["on_policy"].skd.rollout.method == "on_policy" and loads["k5"].skd.rollout.top_k == 5
    assert loads["sft"].skd.loss.kind == "cross_entropy"
    assert len({run.host["rollout.batch_size"] for run in loads.values()}) == 1


def test_measured_once_and_followed_once(plan):
    measured = [run for run in plan.runs() if "skd.eval.at_start=true" in run.overrides]
    assert len(measured) == len(plan.comparison.cells) * len(plan.seeds)
    followed = [run for run in plan.runs() if "openrlhf.ckpt.save_hf=true" in run.overrides]
    assert [(run.method, run.seed) for run in followed] == [(plan.adaptivity.method, plan.seeds[0])] * len(
        plan.adaptivity.cells
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"sweep": {"title": "K", "methods": {"1": "k9"}, "cells": [], "seeds": []}}, "no method k9"),
        ({"adaptivity": {"method": "skd", "cells": ["x/y"], "every": 1, "prompts": 1}}, "no cell x/y"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, change, message):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(yaml.safe_load(PLAN.read_text()) | change))
    with pytest.raises(RecipeError, match=message):
        load_plan(tmp_path / "plan.yaml")


def test_unknown_cell_on_the_command_line(plan):
    with pytest.raises(RecipeError, match="no arithmetic/hot"):
        plan.only(["arithmetic/hot"], None)
    assert {run.seed for run in plan.only(["arithmetic/warm"], [7]).runs()} == {7}


def test_done_is_what_was_run_with_these_arguments(plan, tmp_path):
    run = plan.runs()[0]
    assert not execute.is_done(run, tmp_path)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / execute.ARGUMENTS).write_text(json.dumps(execute.arguments(run)))
    assert execute.is_done(run, tmp_path)
    other = plan.model_copy(update={"methods": {**plan.methods, run.method: plan.methods["k5"]}}).runs()[0]
    assert other.name == run.name and not execute.is_done(other, tmp_path)


def test_a_change_in_a_base_is_another_run(plan, tmp_path):
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text("skd: {rollout: {top_k: 3}}")
    recipe.write_text("base: base.yaml")
    run = replace(plan.runs()[0], recipe=recipe)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / execute.ARGUMENTS).write_text(json.dumps(execute.arguments(run)))
    assert execute.is_done(run, tmp_path)
    base.write_text("skd: {rollout: {top_k: 4}}")
    assert not execute.is_done(run, tmp_path)


@pytest.mark.parametrize("name", ["few-prompts.yaml", "rewards.yaml", "forgetting.yaml"])
def test_a_plans_task_is_what_its_recipe_measures(name):
    plan = load_plan(PLAN.with_name(name))
    first = plan.runs()[0]
    assert execute.sessions([first], 1) == [[first]]
    with pytest.raises(RecipeError, match="the plan has a task chains, but its recipe"):
        execute.sessions([replace(first, task="chains")], 1)


def test_cores_are_dealt_out(monkeypatch):
    monkeypatch.setattr(execute.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert execute.core_shares(2) == [{0, 2}, {1, 3}]
    assert execute.core_shares(6)[4:] == [{0}, {1}]


def finished(folder: Path, run, config: Path, score: float) -> None:
    """The files of a run with two steps, in the form that `skd train` writes."""
    place = folder / run.name
    (place / "model").mkdir(parents=True)
    shutil.copy(config, place)
    metric = {"arithmetic": "accuracy", "translation": "chrf"}[run.task]
    step = {"skd/kd_coef": 1.0, "skd/response_len": 10.0, "skd/undrafted_frac": 0.0, "skd/draft_waste": 0.5}
    step |= {"time/rollout": 1.0, "time/train": 0.5, "skd/accept_rate": 0.9, "skd/teacher_nll": 0.3}
    evaluation = {f"eval/{run.task}/kl": 0.1, f"eval/{run.task}/response_len": 9.0}
    records = [
        {"step": 0, f"eval/{run.task}/teacher_{metric}": 0.99},
        {"step": 0, f"eval/{run.task}/{metric}": 0.1, **evaluation},
        {"step": 1, **step},
        {"step": 2, **step},
        {"step": 2, f"eval/{run.task}/{metric}": score, **evaluation},
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def table(plan, tmp_path):
    first = plan.runs()[0]
    saved = load_run(first.recipe, [*first.overrides, f"skd.run_dir={tmp_path / 'first'}"])
    saved.save()
    for place, run in enumerate(plan.runs()):
        if run.task == "arithmetic":
            finished(tmp_path, run, saved.folder.config, 0.5 + 0.001 * place)
    return collect.runs_table(plan, tmp_path)


def test_a_row_counts_what_was_computed(plan, table):
    row = collect.chosen(table, "arithmetic/cold", "skd")[0]
    assert (row["updates"], row["tokens"]) == (8, 1280)
    # Half of the proposals were thrown away: 2,560 of them, in 640 blocks of four, five positions each.
    assert (row["student_tokens"], row["teacher_tokens"]) == (2560, 3200)
    assert (row["rollout_s"], row["train_s"], row["teacher_score"], row["score_at_start"]) == (2.0, 1.0, 0.99, 0.1)


def test_page_and_figures(plan, table, tmp_path):
    """Cells without a run are shown as empty; the text above the mark stays."""
    written = tmp_path / "README.md"
    written.write_text("# Results\n\nMine.\n\n" + page.MARK + "\n\nearlier")
    page.write_page(plan, table, [], [], written)
    text = written.read_text()
    assert text.startswith("# Results\n\nMine.\n\n") and "earlier" not in text
    assert text.count("\n| SKD | ") == 4 and "| teacher | 99.0 ± 0.0 % |" in text  # two overviews, a table a cell
    assert "| student at the start | 10.0 ± 0.0 % | 10.0 ± 0.0 % |  |  |" in text
    means = [sum(r["score"] for r in collect.chosen(table, "arithmetic/cold", m)) for m in plan.comparison.methods]
    assert max(means) == means[-1] and text.count("| SKD, interpolated 0.5 | **") == 2  # the best is bold
    rows = [{"task": "arithmetic", "start": "cold", "step": s, "accepted": 0.5, "kl": 0.1} for s in (0, 1)]
    for draw, content in (
        (figures.draw_differences, table),
        (figures.draw_comparison, table),
        (figures.draw_cost, table),
        (figures.draw_sweep, table),
        (figures.draw_adaptivity, rows),
    ):
        path = tmp_path / f"{draw.__name__}.png"
        draw(plan, content, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_page_of_finished_students_and_of_other_tasks(plan, table, tmp_path):
    tasks = {
        **plan.tasks,
        "arithmetic": plan.tasks["arithmetic"].model_copy(update={"others": {"summary": "rouge_l"}}),
    }
    cells = {"cells": ["arithmetic/cold"]}
    part = Finished(**cells, draft_len=4, prompts=8, harder=Path("sums.py"))
    comparison = plan.comparison.model_copy(update=cells)
    own = plan.model_copy(update={"tasks": tasks, "comparison": comparison, "finished": part, "sweep": None})
    first = own.comparison.methods[0]
    rows = [
        {**row, "score_summary": 0.6, "score_summary_at_start": 0.7 if row["method"] == first else None}
        for row in table
    ]
    students = [
        {"task": "arithmetic", "start": "cold", "method": method, "seed": 1, "harder": 0.2, **figures}
        for method, figures in (
            (after.TEACHER, {"accepted": None, "tokens_a_block": None}),
            (after.START, {"accepted": 0.75, "tokens_a_block": 3.5}),
            ("skd", {"accepted": 0.8, "tokens_a_block": 3.625}),
        )
    ]
    page.write_page(own, rows, [], students, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "| student at the start | 70.0 ± 0.0 % |" in text and "| SKD, minus that | -10.0 ± 0.0 % |" in text
    assert "| arithmetic, cold | kept in blocks of 4 | tokens a block | accuracy of sums |" in text
    assert "| teacher |  |  | 20.0 % |" in text and "| SKD | 80.0 % | 3.62 | 20.0 % |" in text


def test_several_tasks_have_no_seed_of_their_own(plan):
    forgetting = load_plan(PLAN.with_name("forgetting.yaml"))
    assert not [run for run in forgetting.runs() if any("skd.task.seed" in option for option in run.overrides)]
    run = forgetting.runs()[0]
    assert len(load_run(run.recipe, run.overrides).skd.all_tasks) == 3


def test_tokens_of_a_speculative_block(plan):
    """100 tokens, of which 90 were proposed, of 120 proposals in blocks of four."""

    class Answered:
        def metrics(self, settings, count, seed):
            assert (settings.gate, settings.threshold, count) == ("interpolated", 1, 8)
            return {"tokens": 100, "skd/undrafted_frac": 0.0, "skd/draft_waste": 1 / 6, "skd/accept_rate": 0.9}

    found = after.speculative(Answered(), plan.runs()[0], Finished(cells=[], draft_len=4, prompts=8))
    assert found["accepted"] == 0.9 and found["tokens_a_block"] == pytest.approx(1 + 90 / 30)


def test_a_table_is_the_same_when_read_again(table, tmp_path):
    collect.write_csv(tmp_path / "runs.csv", table)
    assert collect.read_csv(tmp_path / "runs.csv") == table
    assert collect.read_csv(tmp_path / "no.csv") == []


@pytest.mark.parametrize("name", ["few-prompts.yaml", "captions.yaml", "successors.yaml", "rewards.yaml"])
def test_plans_with_seeds_enough(name):
    """One loss for the methods whose text is compared; the same seeds, so the same prompts, for all of them."""
    plan = load_plan(PLAN.with_name(name))
    assert len(plan.seeds) >= 5 and len(plan.runs()) == len(plan.seeds) * len(plan.comparison.methods) * len(
        plan.comparison.cells
    )
    assert all(run.recipe.exists() for run in plan.runs())


def compare_command():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts" / "compare" / "__main__.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    return command


def test_draw_reads_what_was_measured_and_runs_nothing(table, tmp_path, monkeypatch, capsys):
    command = compare_command()
    monkeypatch.setattr(command, "execute", lambda *_: pytest.fail("--draw runs nothing"))
    monkeypatch.setattr(sys, "argv", ["compare", "--draw", "--out", str(tmp_path / "out")])
    assert command.main() == 2 and "there is nothing to draw" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    collect.write_csv(tmp_path / "out" / "runs.csv", table)
    assert command.main() == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs.csv", "README.md", "differences.png", "comparison.png", "cost.png", "sweep.png",
    }  # fmt: skip


def test_interval_is_students_t():
    """Three values, two degrees of freedom: t = 4.3027, s = 1, so the half width is 4.3027 / sqrt(3)."""
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2.0 and interval.half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert Interval.of([1.0]).half is None


def test_p_values_and_their_correction():
    ours, theirs = [0.31, 0.25, 0.4, 0.28], [0.2, 0.22, 0.3, 0.29]
    p = p_value([a - b for a, b in zip(ours, theirs, strict=True)])
    assert p == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert p_value([0.1]) is None and p_value([0.1, 0.1]) is None
    corrected = holm([0.01, None, 0.04, 0.03])
    assert corrected[1] is None and [corrected[i] for i in (0, 2, 3)] == pytest.approx([0.03, 0.06, 0.06])


def test_what_a_number_of_seeds_can_show():
    """Ten pairs find one standard deviation (0.996) four times in five: Cohen's tables."""
    assert detectable(2.0, 10) == pytest.approx(2 * 0.996, rel=2e-3)
    assert detectable(1.0, 10, comparisons=8) > detectable(1.0, 10) > detectable(1.0, 20)
    assert detectable(0.0, 10) == 0 and detectable(1.0, 1) == float("inf")


def scored(method: str, scores: list[float], **other: float) -> list[dict]:
    row = {"task": "arithmetic", "start": "cold", "method": method, "kl": 0.1} | other
    return [{**row, "seed": seed, "score": score} for seed, score in enumerate(scores)]


def test_differences_are_paired_by_seed_and_corrected(plan):
    """`seq_kd` has a seed that the reference has not: it is left out."""
    table = scored("skd", [0.1, 0.2, 0.3]) + scored("sft", [0.05, 0.16, 0.24]) + scored("seq_kd", [0.1, 0.3, 0.2, 0.9])
    found = {(one.method, one.key): one for one in differences.differences(plan, table, "arithmetic/cold")}
    assert set(found) == {(m, k) for m in ("sft", "seq_kd") for k in ("score", "kl")}
    sft = found["sft", "score"]
    assert sft.values == pytest.approx([-0.05, -0.04, -0.06]) and sft.is_clear
    assert sft.p == pytest.approx(2 * p_value(sft.values))  # of two that have a spread
    assert not found["seq_kd", "score"].is_clear and found["sft", "kl"].p is None
    assert differences.smallest(plan, table, "arithmetic/cold", "score") > 0.05
    assert differences.smallest(plan, table[:1], "arithmetic/cold", "score") is None


def test_equal_cost_is_on_the_line_between_two_evaluations():
    def curve(method: str, *points: tuple[int, float, int]) -> list[dict]:
        return [
            {"task": "a", "start": "b", "method": method, "seed": 1, "kl": 0.0, "step": s, "score": x, "tokens": n}
            for s, x, n in points
        ]

    curves = curve("skd", (0, 0.0, 0), (10, 0.4, 100), (20, 0.5, 200)) + curve("sft", (20, 0.3, 150))
    scores = {row["method"]: row["score"] for row in collect.at_equal_cost(curves, "tokens")}
    assert scores == pytest.approx({"skd": 0.45, "sft": 0.3})


def test_runs_of_one_engine_share_a_session(plan):
    """A method that changes what the engine records has sessions of its own; a gate or K has not."""
    runs = [plan.run("arithmetic/cold", method, seed) for seed in (1, 2) for method in ("skd", "k5", "on_policy")]
    other = replace(runs[0], method="wide", overrides=(*runs[0].overrides, "skd.loss.teacher_top_k=16"))
    found = execute.sessions([*runs, other], session_len=4)
    assert [[run.method for run in one] for one in found] == [
        ["skd", "k5", "on_policy", "skd"], ["k5", "on_policy"], ["wide"]
    ]  # fmt: skip


def test_a_failed_run_does_not_stop_those_behind_it(plan, tmp_path, monkeypatch, capsys):
    runs = [plan.run("arithmetic/cold", method, 1) for method in ("skd", "k5", "on_policy")]

    def session_until_k5(runs, folder, log, cores):
        for run in runs:
            if run.method == "k5":
                sys.exit(1)
            (folder / run.name).mkdir()
            (folder / run.name / session.SESSION).write_text("1.5")

    monkeypatch.setattr(execute, "_session", session_until_k5)
    monkeypatch.setattr(execute, "sessions", lambda runs, session_len: [runs])
    monkeypatch.setattr(execute, "POLL_S", 0.01)
    assert execute.execute(runs, tmp_path, 1, 20) == [runs[1]]
    assert [execute.is_done(run, tmp_path) for run in runs] == [True, False, True]
    assert "k5-seed1: FAILED" in capsys.readouterr().out


def test_what_fails_every_time_is_not_tried_for_every_run(plan, tmp_path, monkeypatch, capsys):
    runs = [plan.run("arithmetic/cold", "skd", seed) for seed in range(5)]
    monkeypatch.setattr(execute, "_session", lambda *_: sys.exit(1))
    monkeypatch.setattr(execute, "sessions", lambda runs, session_len: [runs])
    monkeypatch.setattr(execute, "POLL_S", 0.01)
    assert execute.execute(runs, tmp_path, 1, 20) == runs
    told = capsys.readouterr().out
    assert told.count("FAILED") == 2 and "2 sessions in a row came to nothing" in told


def test_a_session_has_one_engine(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(session.launch, "end_with_the_parent", lambda: None)
    for name, seed, extra in (("a", 1, []), ("b", 2, ["skd.rollout.draft_len=3"]), ("c", 3, [])):
        run = plan.run("arithmetic/cold", "skd", seed)
        few = ["skd.task.eval_prompts=8", f"skd.run_dir={tmp_path / name}"]
        load_run(run.recipe, [*run.overrides, *few, *extra]).save()
    with pytest.raises(RuntimeError, match=r"not the engine of .*/a: [^,]*/b; run them in another session"):
        session.main([str(tmp_path / name) for name in "abc"])  # another seed is no other engine
    for name in "ac":
        load_run(
            run.recipe,
            [
                *run.overrides,
                "skd.task.eval_prompts=8",
                "openrlhf.train.async_enable=true",
                f"skd.run_dir={tmp_path / name}",
            ],
        ).save()
    with pytest.raises(RuntimeError, match="take an engine for themselves: --session 1"):
        session.main([str(tmp_path / name) for name in "ac"])


def test_an_actor_in_this_process_is_asked_as_a_remote_one(monkeypatch):
    class Counter:
        def __init__(self, start: int) -> None:
            self.value = start

        def add(self, number: int) -> int:
            self.value += number
            return self.value

    monkeypatch.setattr(ray, "put", lambda value: ("reference", value))
    counter = session.InThisProcess(Counter).remote(3)
    assert counter.add.remote(2) == ("reference", 5)


def test_the_plan_command_runs_nothing(table, tmp_path, monkeypatch, capsys):
    command = compare_command()
    monkeypatch.setattr(command, "execute", lambda *_: pytest.fail("--plan runs nothing"))
    collect.write_csv(tmp_path / "runs.csv", table)
    monkeypatch.setattr(sys, "argv", ["compare", "--plan", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert command.main() == 0
    told = capsys.readouterr().out
    assert re.search(r"(\d+) runs, \1 of them to be run", told)
    assert "arithmetic/cold: 3 seeds find differences to skd of " in told
    assert "translation/cold: no pilot with two seeds" in told
