"""One owner of a run folder at a time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from skd_plugin.errors import RecipeError


def lock_file(folder: Path) -> Path:
    """Beside the folder, as the folder itself may be moved aside. There only while a run has it, or was killed."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder is this process's for as long as this is open. The system gives the lock of a dead process back.

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
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile finds that it is gone
        lock.release()


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", timespec="seconds")


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):  # it has just begun, or ended
        return "of a process that has just started"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
