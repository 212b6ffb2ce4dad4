"""A run that does not move: it says what it waits for, and Ctrl-C ends it. Real locks, processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from skd_plugin import cli
from skd_plugin.run import still
from skd_plugin.run.process import processes_of
from skd_plugin.run_folder import RunFolder
from tests.waiting import wait_for

# `skd train` with another program in the place of OpenRLHF's: it waits as torch does for a build of another process.
TRAIN = """
import sys
from skd_plugin import cli
from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig
from skd_plugin.prepare import load_run
from skd_plugin.run import process, still, supervisor
still.STILL_S = 0.0
run = Run(SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=sys.argv[1]), {}, cpu=True)
load_run.load_run = lambda *_: run
supervisor.run_module = lambda command, *rest, **names: process.run_module(["waits", sys.argv[1]], *rest, **names)
sys.exit(cli.main(["train", "any.yaml"]))
"""
WAITS = """
import os, sys
from pathlib import Path
from torch.utils.file_baton import FileBaton
from skd_plugin.run_folder import RunFolder
RunFolder(Path(sys.argv[1])).status.stage("starting the engine and the trainer")
FileBaton(os.environ["TORCH_EXTENSIONS_DIR"] + "/fused_adam/lock").wait()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "extensions" / "fused_adam" / "lock"
    path.parent.mkdir(parents=True)
    return path


def hear_ctrl_c() -> None:
    """A shell's background job, which the tests may be, ignores SIGINT, and so would everything it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_run_behind_a_lock_says_whose_it_is_and_hears_ctrl_c(lock: Path, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    folder, said = tmp_path / "run", tmp_path / "said"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "TORCH_EXTENSIONS_DIR": str(lock.parents[1]),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    held = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch's FileBaton takes it
    with said.open("w") as output:
        command = [sys.executable, "-c", TRAIN, str(folder)]
        run = subprocess.Popen(command, stdout=output, stderr=output, env=env, preexec_fn=hear_ctrl_c)
    try:
        start = "at the stage 'starting the engine and the trainer': "
        wait_for(lambda: f"{start}process {os.getpid()} (" in said.read_text(), "the word of the lock's holder")
        os.close(held)
        wait_for(lambda: f"{start}{lock} is the lock of a build that was killed" in said.read_text(), "another reason")
        run.send_signal(signal.SIGINT)
        assert run.wait() == 130
    finally:
        run.kill()
        run.wait()
    words = said.read_text()
    assert "Stopped. " in words and "Traceback" not in words
    assert words.count("is the lock of a build that was killed: nobody holds it; remove it. It goes on") == 1
    assert processes_of(str(folder)) == []


class Told(list):
    """A watch on a run folder, and what it tells; `at` is a look at a second of its clock."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._now = RunFolder(path), 0.0
        monkeypatch.setattr(still.time, "monotonic", lambda: self._now)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(path / "extensions"))
        monkeypatch.setattr(still, "HF_HUB_CACHE", str(path / "hub"))
        self._watch = still.Watch(self.folder, self.append)

    def at(self, second: float) -> list[str]:
        self._now = second
        self.clear()
        self._watch.look()
        return list(self)


def test_it_is_told_once_a_stage_and_again_for_another_reason(tmp_path: Path, monkeypatch) -> None:
    told = Told(tmp_path, monkeypatch)
    told.folder.log.write_text("loading\n")
    assert told.at(0) == told.at(119) == []
    (word,) = told.at(120)
    assert word.startswith("Nothing has moved for 2m00s at the stage 'starting': no lock and no resource is missing")
    assert "its log ends with: loading. It goes on waiting" in word
    assert told.at(121) == told.at(300) == [], "the same again is no news"
    told.folder.ray_waits.write_text("Ray waits for GPUs")
    (word,) = told.at(600)
    assert word.startswith("Nothing has moved for 10m00s at the stage 'starting': Ray waits for GPUs. It goes on")
    told.folder.status.stage("training")
    assert told.at(601) == told.at(720) == [] and len(told.at(721)) == 1


def test_a_step_or_an_evaluation_is_a_move(tmp_path: Path, monkeypatch) -> None:
    told = Told(tmp_path, monkeypatch)
    for second in range(0, 1000, 100):
        told.folder.metrics.append({"step": second})
        assert told.at(second) == []
    assert told.at(1019) == [] and len(told.at(1020)) == 1


def test_the_lock_of_a_download_names_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / ".locks" / "models--a--b" / "etag.lock"
    path.parent.mkdir(parents=True)
    with FileLock(path):  # as huggingface_hub does
        (word,) = still.hub_locks(tmp_path, own=set())
        assert word == f"process {os.getpid()} downloads from the Hub and holds {path}"
        assert list(still.hub_locks(tmp_path, own={os.getpid()})) == []
    path.touch()
    assert list(still.hub_locks(tmp_path, own=set())) == [], "a file that nobody has locked"


def test_extensions_are_where_torch_builds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert still.extensions().resolve() == Path(get_default_build_root())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert still.extensions().resolve() == Path(get_default_build_root())


RAY = """
import sys
from pathlib import Path
import ray
from ray.util.placement_group import placement_group
from skd_plugin.host import waiting
from skd_plugin.run_folder import RunFolder
from tests.waiting import wait_for

waiting.POLL_S = 0.1
folder = RunFolder(Path(sys.argv[1]))
folder.status.stage("starting the engine and the trainer")
ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
ray.get(placement_group([{"GPU": 1, "CPU": 1}]).ready())
print([waiting.missing(ray.util.placement_group_table(), ray.cluster_resources())])
placement_group([{"GPU": 1, "CPU": 1}] * 2)
waiting.tell_while_starting(folder)
wait_for(folder.ray_waits.exists, "the words of what is missing")
print([folder.ray_waits.read_text()])
folder.status.stage("training")
wait_for(lambda: not folder.ray_waits.exists(), "their end")
ray.shutdown()
"""


def test_what_ray_has_too_little_of(tmp_path: Path) -> None:
    """In a real Ray of one GPU: first the group has its place, then another has none; only until the run has begun."""
    command = [sys.executable, "-c", RAY, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    need = "the processes of this run need 3 CPU (there are 4), 3 GPU (there are 1)"
    assert said.splitlines()[-2:] == ["['']", f"['Ray waits for resources: {need}']"]


@pytest.mark.parametrize("command", ["train", "check", "eval", "report"])
def test_ctrl_c_before_the_work_begins(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """While a recipe is read and its models are looked at, or downloaded."""

    def stop(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{command}", stop)
    assert cli.main([command, "any.yaml"]) == 130
    assert capsys.readouterr().err == f"skd {command}: stopped by the user\n"
