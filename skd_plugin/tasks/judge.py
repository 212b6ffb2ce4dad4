"""Checkers that parse or evaluate what a model wrote run in processes of their own, walled in and easily killed.

A response is a stranger's text. A checker that evaluates it runs it, and one that computes what it says may never
return, with the interpreter's lock held, so that no time-out in the same process fires. docs/tasks.md says what the
wall holds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

LIMIT_S = 10.0  # of one question; the answer counts as wrong then
START_S = 120.0  # of a process, which imports the checker's libraries
PROCESSES = 2  # of one checker at once, in each process that asks
CHILD = Path(__file__).with_name("judge_process.py")


class JudgeError(RuntimeError):
    """A checker failed by itself, and not by what it was to check."""


class NoAnswer(Exception):
    """The text that was to be checked took too long, or ended the process, or reached for what is walled off."""


class _Process:
    """One process of one checker."""

    def __init__(self, checker: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._scratch = tempfile.mkdtemp(prefix="skd-judge-")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-B",
                str(CHILD),
                checker,
                json.dumps([os.path.abspath(folder) for folder in sys.path]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd=self._scratch,
            start_new_session=True,
        )
        if self._read(START_S) != "ready":
            self._errors.seek(0)
            reason = self._errors.read().strip()[-500:]
            self.close()
            raise JudgeError(f"the checker {checker} does not start: {reason}")

    def ask(self, arguments: list[Any], limit_s: float) -> dict[str, Any] | None:
        """None where no answer came; the process is then of no more use."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        reply = self._read(limit_s)
        return json.loads(reply) if reply else None

    def _read(self, limit_s: float) -> str | None:
        """A line; None if it does not come in time, "" if the process has ended."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        return self._process.stdout.readline().strip() if ready else None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        self._process.kill()
        with (
            contextlib.suppress(BrokenPipeError),
            self._process,
        ):  # closes the pipes, one of which may be full, and waits
            pass
        self._errors.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class _Pool:
    """Processes that wait, by checker; each is one thread's while it is asked."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[str, list[_Process]] = defaultdict(list)
        self._free: dict[str, BoundedSemaphore] = defaultdict(lambda: BoundedSemaphore(PROCESSES))
        self._owner = os.getpid()

    def ask(self, checker: str, arguments: list[Any], limit_s: float) -> dict[str, Any] | None:
        with self._lock:
            if self._owner != os.getpid():  # forked: the pipes are the parent's
                self._waiting.clear()
                self._owner = os.getpid()
            free = self._free[checker]
        with free:
            with self._lock:
                process = self._waiting[checker].pop() if self._waiting[checker] else None
            if process is not None and process.ended:  # by somebody else, between two questions
                process.close()
                process = None
            process = process or _Process(checker)
            reply = None
            try:
                reply = process.ask(arguments, limit_s)
            finally:
                if reply is None:
                    process.close()
                else:
                    with self._lock:
                        self._waiting[checker].append(process)
            return reply

    def close(self) -> None:
        if self._owner == os.getpid():
            for process in (process for waiting in self._waiting.values() for process in waiting):
                process.close()
        self._waiting.clear()


_POOL = _Pool()
atexit.register(_POOL.close)


def ask(checker: str, *arguments: Any, limit_s: float = LIMIT_S) -> Any:
    """What a function says, asked in a process of its own.

    Args:
        checker: `package.module:function`; it takes and returns what JSON holds. The module's `before_the_wall`, if it
            has one, is called first.
        limit_s: seconds.

    Raises:
        NoAnswer: the arguments took too long, ended the process or reached out of it.
        JudgeError: the function failed, or cannot be imported.
    """
    reply = _POOL.ask(checker, list(arguments), limit_s)
    if reply is None:
        raise NoAnswer(f"{checker} took longer than {limit_s:g} s, or its process died")
    if "blocked" in reply:
        raise NoAnswer(f"{checker}: {reply['blocked']}")
    if "error" in reply:
        raise JudgeError(f"{checker} failed at {str(arguments)[:200]}: {reply['error']}")
    return reply["answer"]
