"""The other process of judge.py: a function, walled in. A line of arguments in, a line of answer out.

python -I judge_process.py PACKAGE.MODULE:FUNCTION SYS_PATH

Two walls: the kernel's where it has Landlock (Linux 5.13, unprivileged), and Python's audit hook everywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

MEMORY = 4 << 30  # bytes of address space
# Python's audit events of what a checker has no business with; a name that ends in a dot stands for all of them.
FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
    "os.startfile", "os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.chown", "os.utime", "os.putenv", "os.unsetenv", "os.chdir", "os.fchdir",
    "os.setxattr", "os.removexattr", "shutil.", "tempfile.", "pty.", "signal.", "syslog.", "urllib.", "http.",
    "ftplib.", "smtplib.", "webbrowser.", "fcntl.", "gc.get_objects", "gc.get_referrers", "sys.settrace",
    "sys.setprofile",
)  # fmt: skip
# Linux's system calls and constants of Landlock, the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EVERY_FILE_ACCESS, READING, EVERY_TCP_ACCESS = (1 << 13) - 1, 0b1101, 0b11
NO_NEW_PRIVILEGES = 38


class Blocked(BaseException):
    """No `except Exception` of a checker takes it for an answer in a form that it does not read."""


def main(checker: str, path: list[str]) -> None:
    sys.path[:] = path
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a checker prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, name = checker.partition(":")
    loaded = importlib.import_module(module)
    function = getattr(loaded, name)
    getattr(loaded, "before_the_wall", lambda: None)()  # what it imports only when it is needed
    folders = {os.path.realpath(folder) for folder in (*path, sys.prefix, sys.base_prefix) if folder}
    readable = sorted(folder for folder in folders if os.path.isdir(folder))
    landlock(readable)
    sys.addaudithook(audit_wall(readable))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(function, json.loads(line))), file=replies, flush=True)


def _answer(function: Any, arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"answer": function(*arguments)}
    except (Blocked, MemoryError, RecursionError, SystemExit, KeyboardInterrupt) as error:
        return {"blocked": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def landlock(readable: Sequence[str]) -> bool:
    """From now on this process reads files beneath these folders, and reaches no other file and no network.

    Returns whether the kernel can do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    wanted = _Ruleset(EVERY_FILE_ACCESS, EVERY_TCP_ACCESS)
    rules = libc.syscall(CREATE_RULESET, ctypes.byref(wanted), 16 if version >= 4 else 8, 0)
    for folder in readable:
        place = os.open(folder, os.O_PATH)
        beneath = _Beneath(READING, place)
        libc.syscall(ADD_RULE, rules, 1, ctypes.byref(beneath), 0)
        os.close(place)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    closed = libc.syscall(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return closed


def audit_wall(readable: Sequence[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that lets files beneath these folders be read, and nothing else be reached."""
    whole = frozenset(name for name in FORBIDDEN if not name.endswith("."))
    families = tuple(name for name in FORBIDDEN if name.endswith("."))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    folders = tuple(folder + os.sep for folder in readable)
    # Held here, so that nobody changes them from outside.
    real, decode, blocked, number = os.path.realpath, os.fsdecode, Blocked, int

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            file, _, flags = arguments
            if isinstance(file, number):
                raise blocked("it opened a file descriptor")
            where = real(decode(file))
            if flags & writing or not where.startswith(folders):
                raise blocked(f"it reached for {where}")
        elif event in whole or event.startswith(families):
            raise blocked(f"it reached for {event}")

    return hook


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
