"""A run folder has one owner: a second command on it says whose it is and changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from skd_plugin import cli
from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError
from skd_plugin.prepare import load_run
from skd_plugin.run import supervisor
from skd_plugin.run.lock import lock_file, owned
from skd_plugin.run.process import processes_of
from tests.waiting import wait_for

HOLD = """
import sys, time
from pathlib import Path
from skd_plugin.run.lock import owned
with owned(Path(sys.argv[1]), print):
    print("mine", flush=True)
    time.sleep(600)
"""


# As `skd train` has it: a process of its own, which starts another that leaves its session, as Ray's daemons do.
SUPERVISE = """
import sys
from pathlib import Path
from skd_plugin.run.lock import owned
from skd_plugin.run.process import run_module
folder = Path(sys.argv[1])
with owned(folder, print):
    run_module(["a_run"], folder.with_name("log"), name=str(folder))
"""
A_RUN = """
import subprocess, sys
code = "import sys; print('at work', flush=True); sys.stdin.read()"
process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
process.wait()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run"


@pytest.fixture
def other(folder: Path):
    """Another process whose folder it is."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def test_nothing_is_left_behind(folder: Path) -> None:
    with owned(folder, print):
        assert lock_file(folder).exists() and not folder.exists()
    with pytest.raises(ZeroDivisionError), owned(folder, print):
        _ = 1 / 0
    assert list(folder.parent.iterdir()) == []


def test_the_second_is_told_whose_it_is(other: subprocess.Popen, folder: Path) -> None:
    message = rf"a run is going on in {folder} \(process {other.pid} on .+, since 20\d\d-.+\); .* another skd.run_dir"
    with pytest.raises(RecipeError, match=message), owned(folder, print):
        pass
    assert lock_file(folder).exists(), "the lock is the other's"
    with owned(folder.with_name("run2"), print):
        pass


def test_the_lock_of_a_killed_process_is_none(other: subprocess.Popen, folder: Path) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert lock_file(folder).exists()
    with owned(folder, print):
        pass
    assert not lock_file(folder).exists()


@pytest.fixture
def killed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of a supervisor that was killed with -9 while its run goes on; two processes, which are given."""
    folder.parent.mkdir(parents=True)
    (folder.parent / "a_run.py").write_text(A_RUN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder.parent), *sys.path]))
    log = folder.with_name("log")
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(folder)])
    wait_for(lambda: log.exists() and "at work" in log.read_text(), "the start of the run")
    supervisor.kill()
    supervisor.wait()
    run = processes_of(str(folder))
    assert len(run) == 2
    yield run
    for process in processes_of(str(folder)):
        process.kill()


def test_the_processes_of_a_killed_run_have_it_still(killed: list[psutil.Process], folder: Path) -> None:
    message = rf"processes of a killed run are still at work in {folder}: {killed[0].pid} \(.+\), {killed[1].pid} \("
    with pytest.raises(RecipeError, match=message), owned(folder, print, ending_s=0.0):
        pass
    assert not lock_file(folder).exists(), "whoever was refused leaves nothing behind"
    with owned(folder.with_name("run2"), print, ending_s=0.0):
        pass


def test_their_end_is_waited_for(killed: list[psutil.Process], folder: Path) -> None:
    """First the run's own process is gone, then what it has left behind."""
    told = []

    def tell(line: str) -> None:
        told.append(line)
        threading.Thread(target=end).start()

    def end() -> None:
        for process in sorted(killed, key=lambda process: process.pid):
            process.kill()

    with owned(folder, tell):
        assert processes_of(str(folder)) == []
    assert len(told) == 1 and told[0].startswith(f"The run in {folder} was killed; waiting for its processes to end: ")


def test_processes_of_a_run_are_those_of_its_folder_alone(killed: list[psutil.Process], folder: Path) -> None:
    """Not those of a folder whose name begins with it."""
    assert processes_of(str(folder)) == killed
    assert processes_of(str(folder)[:-1]) == processes_of(f"{folder}:b") == processes_of("") == []


def test_a_second_command_changes_nothing_and_ends_with_2(
    other: subprocess.Popen, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = Run(SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=str(folder)), {}, cpu=True)
    run.save()
    run.folder.metrics.append({"step": 1})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(load_run, "load_run", lambda *_: run)
    assert cli.main(["train", "any.yaml"]) == 2
    said = capsys.readouterr()
    assert f"process {other.pid}" in said.err and said.err.count("\n") == 1 and not said.out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not folder.with_name("run.1").exists()


def test_a_run_holds_it_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=str(folder)), {}, cpu=True)

    def train(*_: object, **__: object) -> int:
        with pytest.raises(RecipeError, match=f"process {os.getpid()} "):
            supervisor.supervise(run)
        return 0

    monkeypatch.setattr(supervisor, "run_module", train)
    assert supervisor.supervise(run) == 0
    assert not lock_file(folder).exists()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "file/run", "cannot be writ"),
    ):
        with pytest.raises(RecipeError, match=f"skd.run_dir: {folder} {message}"), owned(folder, print):
            pass
