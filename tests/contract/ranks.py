"""Processes that train together over gloo, one a rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_ranks(module: str, folder: Path, arguments: Mapping[int, Sequence[str]]) -> None:
    """`python -m tests.contract.MODULE FOLDER/N ARGUMENTS` in N processes for each N of `arguments`, all beside one
    another, each with its RANK, WORLD_SIZE and MASTER_PORT. Returns when all have ended well.
    """
    running = [process for ranks in arguments for process in _start(module, folder / str(ranks), ranks, arguments)]
    for process in running:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]


def _start(
    module: str, folder: Path, ranks: int, arguments: Mapping[int, Sequence[str]]
) -> list[subprocess.Popen[str]]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("", 0))
        env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-m", f"tests.contract.{module}", str(folder), *arguments[ranks]]
    return [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(ranks)
    ]
