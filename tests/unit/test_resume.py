"""What a killed run leaves in its folder, and what is made of it."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from skd_plugin.config.run import DATA_DIGEST, Run
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError
from skd_plugin.run import resume, supervisor


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has written four steps, with its configuration in the folder."""
    skd = SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=str(tmp_path))
    found = Run(skd, {"ckpt.path": str(tmp_path / "checkpoints"), "actor.adam.lr": 1e-3}, cpu=True)
    found.save()
    found.folder.status.stage("training")
    lines = [{"step": 0, "eval/x/kl": 1.0}, *({"step": step, "skd/loss": 1.0} for step in range(1, 5))]
    found.folder.metrics.replace(lines)
    return found


def checkpoint(run: Run, step: int, *, group: str = "_actor", whole: bool = True, tag: str = "global_step") -> None:
    folder = Path(run.host["ckpt.path"]) / group / f"{tag}{step}"
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_text("weights")
    if whole:
        (folder / resume.METRIC_FILE).write_text("{}")
    (folder.parent / "latest").write_text(folder.name)


def recorded_steps(run: Run) -> list[int]:
    return [record["step"] for record in run.folder.metrics.read()]


def tags(run: Run, group: str = "_actor") -> set[str]:
    return {path.name for path in (Path(run.host["ckpt.path"]) / group).iterdir() if path.is_dir()}


def latest(run: Run, group: str = "_actor") -> str:
    return (Path(run.host["ckpt.path"]) / group / "latest").read_text()


def test_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    skd = SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=str(tmp_path))
    assert not resume.look_at(Run(skd, {"ckpt.path": str(tmp_path)}, True)).exists


def test_goes_on_from_the_last_whole_checkpoint(run: Run) -> None:
    checkpoint(run, 2)
    checkpoint(run, 4, whole=False)  # killed while it was being written, by one rank of several
    assert resume.look_at(run).step == 2
    going_on, notes = resume.go_on_from(run, 2)
    assert going_on.host["ckpt.load_enable"] is True and notes == []
    assert recorded_steps(run) == [0, 1, 2]
    assert tags(run) == {"global_step2"} and latest(run) == "global_step2"


def test_a_half_written_line_is_dropped(run: Run) -> None:
    checkpoint(run, 4)
    with run.folder.metrics.path.open("a") as file:
        file.write('{"step": 5, "skd/lo')
    resume.go_on_from(run, 4)
    assert recorded_steps(run) == [0, 1, 2, 3, 4]


def test_a_resume_says_what_it_cannot_read(run: Run) -> None:
    """As a power cut leaves a folder."""
    checkpoint(run, 4)
    run.folder.metrics.path.write_bytes(run.folder.metrics.path.read_bytes() + b"\0" * 512)
    run.folder.traces.path.write_bytes(b'\xff\n{"step": 4}\n')
    run.folder.status.path.write_bytes(b"")
    said = io.StringIO()
    going_on = supervisor.after_the_earlier_run(run, Console(file=said, width=500))
    assert going_on.host["ckpt.load_enable"] is True
    for note in (
        "metrics.jsonl: 1 line left out: half written (line 6); kept in metrics.jsonl.damaged.",
        "traces.jsonl: 1 line left out: no record of JSON (line 1); kept in traces.jsonl.damaged.",
        "status.json is no record of JSON; kept in status.json.damaged.",
    ):
        assert note in said.getvalue()
    assert recorded_steps(run) == [0, 1, 2, 3, 4] and run.folder.traces.read() == [{"step": 4}]


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 60, b"skd: [", b"skd: 3", b"[]", b"\xff", b"skd: {a: 1}\nopenrlhf: {}"]
)
def test_a_recipe_that_cannot_be_read_is_another_one(run: Run, content: bytes) -> None:
    checkpoint(run, 4)
    run.folder.config.write_bytes(content)
    earlier = resume.look_at(run)
    assert earlier.step is None and earlier.reason.startswith("its config.yaml cannot be read (")


def test_traces_are_cut_with_the_metrics(run: Run) -> None:
    checkpoint(run, 2)
    run.folder.traces.path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    resume.go_on_from(run, 2)
    assert run.folder.traces.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_actor_and_critic_go_on_from_the_same_step(run: Run) -> None:
    """Killed between the two: the actor's newer checkpoint is of no use."""
    run = replace(run, host={**run.host, "algo.advantage.estimator": "gae"})
    run.save()
    for step in (2, 4):
        checkpoint(run, step)
    checkpoint(run, 2, group="_critic")
    assert resume.look_at(run).step == 2
    resume.go_on_from(run, 2)
    assert tags(run) == tags(run, "_critic") == {"global_step2"}
    assert latest(run) == latest(run, "_critic") == "global_step2"


def test_the_best_checkpoint_of_an_evaluation_counts(run: Run) -> None:
    checkpoint(run, 2)
    checkpoint(run, 4, tag="best_global_step")
    assert resume.look_at(run).step == 4
    resume.go_on_from(run, 4)
    assert latest(run) == "best_global_step4"


def test_an_empty_latest_is_mended(run: Run) -> None:
    checkpoint(run, 2)
    (Path(run.host["ckpt.path"]) / "_actor" / "latest").write_text("")
    resume.go_on_from(run, resume.look_at(run).step)
    assert latest(run) == "global_step2"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run: run.folder.status.stage("done"), "it is finished"),
        (lambda run: None, "it had no checkpoint yet"),
    ],
)
def test_a_run_that_is_not_gone_on_with(run: Run, change, reason: str) -> None:
    if reason == "it is finished":
        checkpoint(run, 4)
    change(run)
    earlier = resume.look_at(run)
    assert earlier.exists and earlier.step is None and earlier.reason == reason


def test_another_recipe_is_another_run(run: Run) -> None:
    checkpoint(run, 4)
    other = Run(run.skd.model_copy(update={"traces_per_step": 9}), {**run.host, "actor.adam.lr": 2e-3}, cpu=True)
    earlier = resume.look_at(other)
    assert earlier.step is None
    assert earlier.reason == "its recipe was another one (openrlhf.actor.adam.lr, skd.traces_per_step)"
    forced = replace(other, host={**other.host, "ckpt.load_enable": True})
    assert resume.look_at(forced).step == 4


def test_another_name_for_the_logger_is_the_same_run(run: Run) -> None:
    checkpoint(run, 4)
    assert resume.look_at(replace(run, host={**run.host, "logger.wandb.run_name": "another"})).step == 4


def test_a_teacher_that_is_served_elsewhere_now_is_the_same_one(run: Run) -> None:
    """But one that has left the engine is not."""
    checkpoint(run, 4)

    def at(url: str, timeout_s: float) -> Run:
        teacher = {"model_name_or_path": "t", "url": url, "server": {"timeout_s": timeout_s}}
        return replace(run, skd=SKDConfig(teacher=teacher, rollout={"method": "on_policy"}, run_dir=run.skd.run_dir))

    assert "skd.teacher.url" in resume.look_at(at("http://a:1", 60)).reason
    at("http://a:1", 60).save()
    assert resume.look_at(at("http://b:1", 30)).step == 4


def test_a_checkpoint_that_others_may_have_written_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed unpickles it."""
    checkpoint(run, 4)
    assert resume.look_at(run).step == 4
    weights = next(Path(run.host["ckpt.path"]).rglob("*.pt"))
    weights.chmod(0o666)
    with pytest.raises(RecipeError, match=r"model_states\.pt can be written by every user of this machine"):
        resume.look_at(run)
    trusted = replace(run, host={**run.host, "ckpt.load_enable": True})
    assert resume.look_at(trusted).step == 4
    weights.chmod(0o644)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RecipeError, match=r"_actor belongs to another user, and to load it is to run what is in it"):
        resume.look_at(run)


def test_resume_can_be_turned_off(run: Run) -> None:
    checkpoint(run, 4)
    off = replace(run, skd=run.skd.model_copy(update={"resume": False}))
    assert resume.look_at(off).step is None and "skd.resume is false" in resume.look_at(off).reason


def test_other_prompts_are_another_run(run: Run) -> None:
    """The same recipe over other data; test_datasets.py and test_load_run.py say what is."""
    mine = replace(run, data_digest="abc")
    mine.save()
    checkpoint(run, 4)
    assert resume.look_at(mine).step == 4
    earlier = resume.look_at(replace(run, data_digest="other"))
    assert earlier.step is None and earlier.reason == "its data were others (the prompts have changed)"


def test_a_run_from_before_the_digest_goes_on(run: Run) -> None:
    checkpoint(run, 4)
    content = run.folder.read_config()
    del content[DATA_DIGEST]
    run.folder.write_config(content)
    assert resume.look_at(replace(run, data_digest="abc")).step == 4


# --- what an earlier run has left stays what it was ---


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_loading_a_recipe_writes_nothing(quickstart, tmp_path: Path) -> None:
    """Neither one that is another run than that in the folder, nor one that is refused."""
    quickstart()
    assert not (tmp_path / "run").exists()
    quickstart().save()
    before = bytes_of(tmp_path)
    assert before.keys() == {"run/config.yaml", "run/data/train.jsonl", "run/data/test.jsonl"}
    other, same = quickstart("skd.task.seed=1"), quickstart()
    assert other.data != same.data and other.data_digest != same.data_digest == quickstart().data_digest
    with pytest.raises(RecipeError, match="n_samples_per_prompt is 2"):
        quickstart("skd.rollout.method=supervised", "openrlhf.rollout.n_samples_per_prompt=2")
    with pytest.raises(RecipeError, match="there are 1 prompts"):
        quickstart("skd.task.train_prompts=1")
    assert bytes_of(tmp_path) == before


def test_a_run_that_is_put_aside_keeps_its_prompts(quickstart, tmp_path: Path) -> None:
    earlier, run = quickstart(), quickstart("skd.task.seed=1")
    earlier.save()
    earlier.folder.metrics.append({"step": 1})
    before = bytes_of(tmp_path / "run")
    said = io.StringIO()
    supervisor.after_the_earlier_run(run, Console(file=said, width=500)).save()
    assert "its recipe was another one (skd.task.seed) and its data were others" in said.getvalue()
    assert bytes_of(tmp_path / "run.1") == before
    assert run.folder.prompts("train").read() == run.data["train"] != earlier.data["train"]
    assert not run.folder.metrics.path.exists()
