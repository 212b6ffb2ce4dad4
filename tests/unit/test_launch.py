"""What the process that becomes OpenRLHF prepares before it loads anything."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from skd_plugin import cpu
from skd_plugin.host import launch
from skd_plugin.host.launch import _report_to, import_user_code, own_programs_first
from skd_plugin.run_folder import Status


def test_ninja_is_this_environments(tmp_path):
    """DeepSpeed's operators are built by one and the same ninja, whether or not the environment is activated."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    path = own_programs_first(str(tmp_path))
    own = Path(sys.executable).parent
    assert shutil.which("ninja", path=path) == str(own / "ninja" if (own / "ninja").exists() else other)
    assert own_programs_first("") == str(own) and path.split(os.pathsep)[1:] == [str(tmp_path)]


@pytest.mark.parametrize("option", ["reward.remote_url", "train.agent_func_path"])
def test_a_users_file_that_fails_is_named_before_anything_starts(tmp_path: Path, option: str) -> None:
    file = tmp_path / "own.py"
    file.write_text("import no_such_package_of_mine")
    with pytest.raises(
        RuntimeError, match=rf"openrlhf\.{option}: {file} cannot be imported: ModuleNotFoundError: .*mine"
    ):
        import_user_code({option: str(file)})
    file.write_text("reward_func = AgentExecutor = 1")
    import_user_code({option: f"{file},http://other", "data.prompt_dataset": "x"})
    import_user_code({option: "http://localhost:5000"})


@pytest.mark.parametrize("in_a_worker", [False, True])
def test_a_full_disk_is_told_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_a_worker: bool
) -> None:
    """Ray has what a worker raised as the `cause` of an error of its own."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error: Exception = RuntimeError("of Ray") if in_a_worker else full
    if in_a_worker:
        error.cause = full
    _report_to(Status(tmp_path))(type(error), error, None)
    told = "OSError: [Errno 28] No space left on device. Make room, or point skd.run_dir at another disk"
    assert Status(tmp_path).read() == {"stage": "failed", "error": told}
    assert type(error).__name__ in capsys.readouterr().err


def test_a_status_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = Status(tmp_path / "gone")
    _report_to(gone)(KeyError, KeyError("the first"), None)
    said = capsys.readouterr().err
    assert f"could not write {gone.path}: " in said and "KeyError: 'the first'" in said


@pytest.mark.parametrize(("of_the_shell", "threads"), [(None, "1"), ("2", "2")])
def test_processes_on_a_cpu_have_one_thread_or_as_many_as_the_shell_says(
    monkeypatch: pytest.MonkeyPatch, of_the_shell: str | None, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if of_the_shell:
        monkeypatch.setenv("OMP_NUM_THREADS", of_the_shell)
    assert cpu.environment()["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("late", [3, 1000])
def test_rays_node_may_come_late(monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    """Or never: then Ray's own error is the one that is seen. Args: late: how often it is not there."""
    from ray._private import services

    now, looks = [0.0], []

    def look(*node: str) -> str:
        looks.append(node)
        if len(looks) <= late:
            raise RuntimeError("no such node")
        return "a node"

    monkeypatch.setattr(services, "get_node", look)
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    launch.wait_longer_for_ray()
    if late == 3:
        assert services.get_node("address", "id") == "a node" and looks == [("address", "id")] * 4
        return
    with pytest.raises(RuntimeError, match="no such node"):
        services.get_node("address", "id")
    assert launch.RAY_START_S < now[0] < launch.RAY_START_S + 1
