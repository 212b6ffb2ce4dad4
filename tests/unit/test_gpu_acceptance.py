"""scripts/gpu_acceptance.sh without a GPU: what it says, that a stage's end is not the others', and what is in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gpu_acceptance
import pytest
import torch
from gpu_acceptance import Stage, steps_of

from skd_plugin.config.host_options import host_parser
from skd_plugin.prepare.load_run import load_run

ROOT = Path(__file__).parents[2]
UNTRIED = re.compile(
    r"no gpu has|not tried here|nobody has tried|have not been (run|seen)|\bnot run: `", re.IGNORECASE
)
STAGES = gpu_acceptance.stages(hub=False, cpu=False)
RUNS = [stage for stage in STAGES if "train" in stage.module]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_acceptance.main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_stage_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_acceptance.main(["--cpu", "--only", "lore"])
    assert "no stage is called lore; there are environment, check, law" in capsys.readouterr().err


def test_stages_go_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends well, one that fails, one that hangs, one that cannot run here, and one behind them."""
    monkeypatch.setattr(gpu_acceptance, "FOLDER", tmp_path / "logs")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    chosen = [
        Stage("good", "a", ["this"], 60, keep="^Beautiful"),
        Stage("bad", "b", ["json.tool", str(broken)], 60),
        Stage("slow", "c", ["http.server", "0", "--bind", "127.0.0.1"], 1),
        Stage("absent", "d", ["this"], 60, needs="no_such_package"),
        Stage("last", "e", ["this"], 60, keep="^Now"),
    ]
    out = tmp_path / "report.md"
    status = gpu_acceptance.accept(chosen, out, ["--cpu"], lambda stage: gpu_acceptance.reason_not_to(stage, cpu=True))
    text = out.read_text()
    assert status == 1 and "**2 of 5 stages failed: bad, slow**" in text
    assert "Beautiful is better than ugly." in text and "Now is better than never." in text
    assert "it ended with status 1" in text and "Expecting property name" in text
    assert "it took longer than 1 s, and was ended" in text
    assert "| absent | not run: needs the package no_such_package | 0 | d |" in text
    assert text.index("## bad: FAILED") < text.index("## good: ok")
    assert gpu_acceptance.accept(chosen[:1], out, [], lambda stage: None) == 0
    assert "No stage failed; 1 of 1 ran." in out.read_text()


@pytest.mark.parametrize("stage", RUNS, ids=[stage.name for stage in RUNS])
def test_its_runs_are_accepted_by_the_host(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a GPU can see: our schema, OpenRLHF's parser and its checks between options."""
    monkeypatch.setenv("RAY_ADDRESS", "a cluster with GPUs")
    words = stage.module[stage.module.index("train") + 1 :]
    run = load_run(ROOT / words[0], [*words[1:], "skd.task.train_prompts=64", f"skd.run_dir={tmp_path}"])
    assert not run.cpu
    options = vars(host_parser().parse_args(run.host_argv()))
    if options["train.colocate_all"]:  # the host asks for it in its train()
        engines = options["vllm.num_engines"] * options["vllm.tensor_parallel_size"]
        assert options["actor.num_nodes"] * options["actor.num_gpus_per_node"] == engines


def test_what_the_pages_call_untried_is_in_it_or_named() -> None:
    named = {page for stage in STAGES for page in stage.pages}
    named |= {page for line in gpu_acceptance.NOT_IN_IT for page in re.findall(r"docs/\w+\.md", line)}
    untried = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if UNTRIED.search(page.read_text())}
    assert untried and untried <= named, untried - named


def test_what_it_starts_is_there() -> None:
    for stage in [*STAGES, *gpu_acceptance.stages(hub=True, cpu=True)]:
        files = [word for word in stage.module if word.startswith(("tests/", "recipes/"))]
        files += [f"{word.replace('.', '/')}.py" for word in stage.module[:1] if word.startswith("scripts.")]
        assert all((ROOT / file).is_file() for file in files), stage.name
    assert shutil.which("bash") and (ROOT / "scripts" / "gpu_acceptance.sh").is_file()


def test_patience_is_for_slow_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Stage] = []
    monkeypatch.setattr(gpu_acceptance, "accept", lambda chosen, *others: planned.extend(chosen) or 0)
    assert gpu_acceptance.main(["--cpu", "--only", "law", "--patience", "2.5"]) == 0
    (law,) = (stage for stage in STAGES if stage.name == "law")
    assert [(stage.name, stage.limit_s) for stage in planned] == [("law", round(2.5 * law.limit_s))]


def test_report_of_a_run_has_losses_and_where_its_steps_go(tmp_path: Path) -> None:
    lines = [{"step": n, "skd/loss": 0.5 / n, "time/step": 1.0 + n, "time/draft": 0.25} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    *table, times = steps_of(tmp_path)
    assert [line.split()[:2] for line in table] == [["step", "skd/loss"], ["1", "0.5"], ["2", "0.25"]]
    assert times == "a step in ms, medians of 3: step 3000.0, draft 250.0"
    (tmp_path / "metrics.jsonl").unlink()
    assert len(steps_of(tmp_path)) == 1
