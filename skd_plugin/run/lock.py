"""One owner of a run folder at a time.

A lock says whose it is. It is the supervisor's; should that be killed with `kill -9`, the system gives its lock back
at once, while the processes of its run end some seconds later and may still write. So the folder is only free when
there is none of them on this machine either.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from skd_plugin.errors import RecipeError
from skd_plugin.run.process import processes_of

ENDING_S = 60.0  # for the processes of a killed run, which end by themselves when they miss their parent


def lock_file(folder: Path) -> Path:
    """Beside the folder, as the folder itself may be moved aside. There only while a run has it, or was killed."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def owned(folder: Path, tell: Callable[[str], None], ending_s: float = ENDING_S) -> Iterator[None]:
    """The folder is this process's for as long as this is open. The system gives the lock of a dead process back.

    Args:
        tell: called with a line where processes of a killed run are waited for.
        ending_s: seconds for which they are.

    Raises:
        RecipeError: another process has it, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"skd.run_dir: {folder} is a file; name a folder")
    path = lock_file(folder)
    lock = FileLock(path, timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RecipeError(
            f"skd.run_dir: a run is going on in {folder} ({_owner(path)}); wait for its end, stop it with Ctrl-C, or "
            "give this one another skd.run_dir"
        ) from error
    except OSError as error:
        raise RecipeError(f"skd.run_dir: {folder} cannot be written: {error.strerror or error}") from error
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}))
        _wait_for_the_end(folder, tell, ending_s)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile finds that it is gone
        lock.release()


def _wait_for_the_end(folder: Path, tell: Callable[[str], None], ending_s: float) -> None:
    """Of a killed run's processes, and of those that they start meanwhile."""
    deadline = time.monotonic() + ending_s
    if left := processes_of(str(folder)):
        tell(f"The run in {folder} was killed; waiting for its processes to end: {_names(left)}")
    while left:
        if time.monotonic() >= deadline:
            raise RecipeError(
                f"skd.run_dir: processes of a killed run are still at work in {folder}: {_names(left)}; end them "
                "(kill), or give this one another skd.run_dir"
            )
        psutil.wait_procs(left, timeout=min(1.0, ending_s))
        left = processes_of(str(folder))


def _names(processes: list[psutil.Process]) -> str:
    """The first few, with their number: "123 (python), 124 (raylet)"."""
    shown = []
    for process in processes[:4]:
        try:
            shown.append(f"{process.pid} ({process.name()})")
        except psutil.NoSuchProcess:
            shown.append(str(process.pid))
    return ", ".join(shown) + (f" and {len(processes) - 4} more" if len(processes) > 4 else "")


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", timespec="seconds")


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):  # it has just begun, or ended
        return "of a process that has just started"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
