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
from skd_plugin.run import resume
from skd_plugin.run.progress import Follower, summary_table
from skd_plugin.run_folder import RunFolder

POLL_S = 0.5
GRACE_S = 10.0  # for the host to end by itself after a signal
RUN_ID = "SKD_RUN_ID"  # environment variable by which every process of a run is found again


def supervise(run: Run) -> int:
    """Runs the recipe to its end. Returns 0, 1 (failed; the last error is printed) or 130 (Ctrl-C)."""
    console = Console(highlight=False, soft_wrap=True)
    run = after_the_earlier_run(run, console)
    run.save()
    console.print(f"Run folder {run.folder.path}; the host's own output goes to {run.folder.log.name} there")
    if run.skd.rollout.notice:
        console.print(run.skd.rollout.notice)
    run_id, started = f"{run.folder.path}:{uuid.uuid4().hex}", time.monotonic()
    host = _start_host(run.folder, run_id)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    follower = Follower(run.folder, console)
    try:
        with console.status("starting") as spinner:
            while host.poll() is None:
                follower.show_news(spinner)
                time.sleep(POLL_S)
            follower.show_news(spinner)
    except KeyboardInterrupt:
        run.folder.status.stage("stopped", error="stopped by the user")
        console.print(f"Stopped. {_how_to_go_on(run)}")
        return 130
    finally:
        _end_host(host, run_id)
    if host.returncode != 0:
        error = run.folder.status.read().get("error") or f"the host process ended with status {host.returncode}"
        console.print(f"[red]The run failed:[/red] {error}", markup=True)
        console.print(f"The whole story is in {run.folder.log}. {_how_to_go_on(run)}")
        return 1
    console.print(summary_table(run.folder, time.monotonic() - started))
    console.print(f"The student is in {run.folder.model}; everything else is beside it")
    return 0


def _start_host(folder: RunFolder, run_id: str) -> subprocess.Popen[bytes]:
    with folder.log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "skd_plugin.host.launch", str(folder.path)],
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


def after_the_earlier_run(run: Run, console: Console) -> Run:
    """Goes on with an earlier run in the folder where that is possible, or else moves it out of the way."""
    earlier = resume.look_at(run)
    if not earlier.exists:
        return run
    if earlier.step is not None:
        console.print(f"An unfinished run is here; going on from its checkpoint of step {earlier.step}")
        return resume.prepare(run, earlier.step)
    console.print(f"An earlier run was here; {earlier.reason}, so it is now in {_put_aside(run)}")
    return run


def _put_aside(run: Run) -> Path:
    folder, number = run.folder.path, 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(kept)
    return kept


def _how_to_go_on(run: Run) -> str:
    step = resume.last_step(run)
    if step is None:
        return "No checkpoint was saved (openrlhf.ckpt.save_steps), so the same command starts from the beginning"
    return f"The same command goes on from the checkpoint of step {step}"
