"""Processes that train together over gloo, one a rank; forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.waiting import GUARD_S

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.contract.hosts"])


def run_ranks(module: str, groups: Mapping[Path, tuple[int, Sequence[str]]]) -> None:
    """`python -m tests.contract.MODULE FOLDER ARGUMENTS` in N processes for each FOLDER: (N, ARGUMENTS) of `groups`.

    All run beside one another, each with its RANK, WORLD_SIZE and MASTER_PORT. Makes the folders, and returns when all
    have ended well.
    """
    running = {}
    for folder, (ranks, arguments) in groups.items():
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("", 0))
            group = {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(ranks):
            log, env = folder / f"rank{rank}.log", {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running[log] = FORKED.Process(target=_rank, args=(module, [str(folder), *arguments], env, log))
            running[log].start()
    for log, process in running.items():
        process.join(GUARD_S)
        assert process.exitcode == 0, log.read_text()[-3000:]


def _rank(module: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
    written = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(written, stream.fileno())
    os.environ |= env
    sys.argv = [module, *arguments]
    runpy.run_module(f"tests.contract.{module}", run_name="__main__", alter_sys=True)
