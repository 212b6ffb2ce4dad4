"""Work in a process of its own: what it says, what it leaves in its log, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from skd_plugin.run.process import last_error, run_module, run_quietly
from tests.waiting import wait_for

SLEEP = "import subprocess, sys\nsleep = [sys.executable, '-c', 'import time; time.sleep(3600)']\n"
# As it comes through Ray: the engine's own process, then the actor that waited for it, then who waited for the actor.
ENGINE_THAT_DID_NOT_START = """
\x1b[36m(ConfiguredRollout pid=5)\x1b[0m (EngineCore pid=6)     raise ValueError(
\x1b[36m(ConfiguredRollout pid=5)\x1b[0m (EngineCore pid=6) ValueError: No available memory for the cache blocks.
\x1b[36m(ConfiguredRollout pid=5)\x1b[0m (EngineCore pid=6) ERROR 11-27 [core.py:1374] ValueError: No available memory
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, ray::Rollout.__init__()
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
\x1b[36m(ConfiguredRollout pid=5)\x1b[0m RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`module(code)`: the name of a module with this code, for `python -m`."""

    def write(code: str) -> str:
        (tmp_path / "its_own.py").write_text(code)
        return "its_own"

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return write


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_ends_well_says_nothing(tmp_path: Path, module, capfd) -> None:
    name = module("import sys; print('chatter', sys.argv[1])")
    assert run_quietly([name, "x"], tmp_path / "log") is None
    assert (tmp_path / "log").read_text() == "chatter x\n" and capfd.readouterr() == ("", "")


def test_the_error_is_found_in_the_chatter(tmp_path: Path, module) -> None:
    log = tmp_path / "log"
    code = "print('x')\nimport atexit; atexit.register(print, 'bye')\nraise ValueError('no room')"
    assert run_quietly([module(code)], log) == "ValueError: no room"
    log.write_text("(EngineCore pid=7) RuntimeError: dead\nwarnings\n")
    assert last_error(log) == "RuntimeError: dead"
    log.write_text("x.ValidationError: 1 error for A\n  unknown option [b=1]\n    read more\n")
    assert last_error(log) == "x.ValidationError: 1 error for A unknown option [b=1]"
    log.write_text(ENGINE_THAT_DID_NOT_START)
    assert last_error(log) == "ValueError: No available memory for the cache blocks."
    log.write_text("one\ntwo\n\n")
    assert last_error(log) == "two"


def test_the_status_is_handed_on(tmp_path: Path, module) -> None:
    assert run_module([module("raise SystemExit(7)")], tmp_path / "log") == 7
    assert run_quietly([module("raise SystemExit(7)")], tmp_path / "log") == "it ended with status 7"


@pytest.mark.parametrize("own_session", [False, True])
def test_nothing_outlives_it(tmp_path: Path, module, own_session: bool) -> None:
    """Not even what has left its session, as Ray's daemons do."""
    code = f"print(subprocess.Popen(sleep, start_new_session={own_session}).pid, flush=True)"
    assert run_quietly([module(SLEEP + code)], tmp_path / "log") is None
    pid = int((tmp_path / "log").read_text())
    wait_for(lambda: gone(pid), "the end of what the process has started")


def test_nothing_outlives_ctrl_c(tmp_path: Path, module) -> None:
    log = tmp_path / "log"
    code = "import os\nprint(os.getpid(), subprocess.Popen(sleep).pid, flush=True)\nimport time; time.sleep(3600)"

    def look() -> None:
        if log.read_text().endswith("\n"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_module([module(SLEEP + code)], log, look)
    for pid in map(int, log.read_text().split()):
        wait_for(lambda pid=pid: gone(pid), "the end of both")


def test_nothing_outlives_a_second_ctrl_c(tmp_path: Path, module) -> None:
    """It comes while the process is given time to end: here from that process itself, which goes on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    log = tmp_path / "log"
    again = "import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))\n"
    code = again + SLEEP + "print(os.getpid(), subprocess.Popen(sleep).pid, flush=True)\nwhile True: time.sleep(1)"

    def look() -> None:
        if log.read_text().endswith("\n"):
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_module([module(code)], log, look)
    finally:
        signal.signal(signal.SIGINT, before)
    for pid in map(int, log.read_text().split()):
        wait_for(lambda pid=pid: gone(pid), "the end of both")
