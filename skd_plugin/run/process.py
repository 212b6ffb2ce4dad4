"""Work in a process of its own: its chatter goes to a file, and it ends with the command that started it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

GRACE_S = 5.0
POLL_S = 0.5
# vLLM puts "(EngineCore pid=7)" in front.
ERROR = re.compile(r"^(?:\(.*?\)\s*)?([\w.]*(?:Error|Exception|Interrupt)\b.*)$")


def run_quietly(module_and_arguments: Sequence[str], log: Path, look: Callable[[], None] = lambda: None) -> str | None:
    """`python -m` with both outputs into `log`. Returns None, or the error that ended it.

    Args:
        look: called twice a second until it ends.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: Ctrl-C comes here first, and `_end` reaches all of it
        )
    try:
        status = _wait(process, look)
    finally:
        _end(process)
    return None if status == 0 else last_error(log) or f"it ended with status {status}"


def last_error(log: Path) -> str | None:
    """The last line of the log that reads like an exception, with the indented line below it, which in a validation
    error holds the reason; else the last line that says anything."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for number in reversed(range(len(lines))):
        if match := ERROR.match(lines[number].strip()):
            below = lines[number + 1 : number + 2]
            return " ".join([match[1], *(line.strip() for line in below if line.startswith("  "))])
    return lines[-1].strip() if lines else None


def _wait(process: subprocess.Popen[bytes], look: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            look()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it has started, unless it is gone already."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
