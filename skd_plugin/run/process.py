"""Work in a process of its own: its chatter goes to a file, and nothing of it outlives the command that started it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

POLL_S = 0.5
GRACE_S = 10.0  # for the process to end by itself after a signal
RUN_ID = "SKD_RUN_ID"  # environment variable by which everything that a process has started is found again
# vLLM puts "(EngineCore pid=7)" in front, and Ray a coloured "(SKDRollout pid=5)" before that.
PREFIX = r"^((?:\x1b\[\d*m|\([^()]*\)|\s)*)"
ERROR = re.compile(PREFIX + r"([\w.]*(?:Error|Exception|Interrupt)\b.*)$")
ENGINE = "EngineCore"  # vLLM's process of an engine
ELSEWHERE = "See root cause above"  # in vLLM's error where that process has failed


def _nothing() -> None:
    pass


def run_module(
    module_and_arguments: Sequence[str], log: Path, look: Callable[[], None] = _nothing, name: str = "skd"
) -> int:
    """`python -m` with both outputs into `log`; returns its exit status.

    It and everything that it started on this machine (Ray's daemons, actors, vLLM's processes) have ended when this
    returns, or raises KeyboardInterrupt.

    Args:
        look: called twice a second until it ends.
        name: what its processes have in their environment begins with it.
    """
    run_id = f"{name}:{uuid.uuid4().hex}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the other in order
            env={**os.environ, RUN_ID: run_id, "PYTHONUNBUFFERED": "1"},
        )
    try:
        while True:
            try:
                return process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                look()
    finally:
        _end(process, run_id)


def run_quietly(module_and_arguments: Sequence[str], log: Path, look: Callable[[], None] = _nothing) -> str | None:
    """`run_module`; returns None, or the error that ended it."""
    status = run_module(module_and_arguments, log, look)
    return None if status == 0 else last_error(log) or f"it ended with status {status}"


def last_error(log: Path) -> str | None:
    """The last line of the log that reads like an exception, with the indented line below it, which in a validation
    error holds the reason; else the last line that says anything. Where it is vLLM's word that an engine has not
    started, the last one of that engine's own process.
    """
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    process = ""
    for number in reversed(range(len(lines))):
        match = ERROR.match(lines[number].strip())
        if match and ELSEWHERE in match[2]:
            process = ENGINE
        elif match and process in match[1]:
            below = lines[number + 1 : number + 2]
            return " ".join([match[2], *(line.strip() for line in below if line.startswith("  "))])
    return lines[-1].strip() if lines else None


def _end(process: subprocess.Popen[bytes], run_id: str) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once
            process.kill()
            process.wait()
    for left in _others(lambda known: known == run_id):
        try:
            left.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def processes_of(name: str) -> list[psutil.Process]:
    """What `run_module` calls of this name have started on this machine and what is alive, this process apart."""
    return _others(lambda known: known.rpartition(":")[0] == name)


def _others(is_wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """Processes by the RUN_ID in their environment, which each has from its first instruction on."""
    found = []
    for process in psutil.process_iter():
        try:
            known = process.environ().get(RUN_ID)
            if known and process.pid != os.getpid() and is_wanted(known):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # of another user, or it has ended, zombies included
            continue
    return found
