"""Starts the host in a process of its own, shows its progress, and leaves nothing of it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
from rich.console import Console

from skd_plugin.config.run import Run
from skd_plugin.terminal.progress import Follower, summary_table
from skd_plugin.trainer.status import Status

POLL_S = 0.5
GRACE_S = 10.0  # for the host to end by itself after a signal
RUN_ID = "SKD_RUN_ID"  # environment variable by which every process of a run is found again


def supervise(run: Run) -> int:
    """Runs the recipe to its end. Returns 0, 1 (failed; the last error is printed) or 130 (Ctrl-C)."""
    console = Console(highlight=False, soft_wrap=True)
    kept = _put_old_run_aside(run)
    config_path = run.save()
    if kept is not None:
        console.print(f"An earlier run was here; it is now in {kept}")
    console.print(f"Run folder {run.folder}; the host's own output goes to host.log there")
    run_id, started = f"{run.folder}:{uuid.uuid4().hex}", time.monotonic()
    host = _start_host(config_path, run.folder / "host.log", run_id)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    follower = Follower(run.folder, console)
    try:
        with console.status("starting") as spinner:
            while host.poll() is None:
                follower.show_news(spinner)
                time.sleep(POLL_S)
            follower.show_news(spinner)
    except KeyboardInterrupt:
        Status(run.folder).stage("stopped", error="stopped by the user")
        console.print(f"Stopped. The last checkpoint, if one was saved, is in {run.folder / 'checkpoints'}")
        return 130
    finally:
        _end_host(host, run_id)
    if host.returncode != 0:
        error = Status(run.folder).read().get("error") or f"the host process ended with status {host.returncode}"
        console.print(f"[red]The run failed:[/red] {error}", markup=True)
        console.print(f"The whole story is in {run.folder / 'host.log'}")
        return 1
    console.print(summary_table(run.folder, time.monotonic() - started))
    console.print(f"The student is in {run.folder / 'model'}; everything else is beside it")
    return 0


def _start_host(config_path: Path, log: Path, run_id: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "skd_plugin.trainer.launch", str(config_path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the host in order
            env={**os.environ, RUN_ID: run_id, "PYTHONUNBUFFERED": "1"},
        )


def _end_host(host: subprocess.Popen[bytes], run_id: str) -> None:
    """Ends the host and everything it started (Ray's daemons, actors, vLLM's processes) on this machine."""
    if host.poll() is None:
        host.send_signal(signal.SIGTERM)
        try:
            host.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            host.kill()
    for process in _processes_of(run_id):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _processes_of(run_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(RUN_ID) == run_id:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _put_old_run_aside(run: Run) -> Path | None:
    """Moves the results of an earlier run out of the way, unless this one resumes it."""
    if run.host.get("ckpt.load_enable") or not (run.folder / "metrics.jsonl").exists():
        return None
    number = 1
    while (kept := run.folder.with_name(f"{run.folder.name}.{number}")).exists():
        number += 1
    run.folder.rename(kept)
    if (kept / "data").exists():  # the prompts of this run have just been written there
        run.folder.mkdir()
        (kept / "data").rename(run.folder / "data")
    return kept
