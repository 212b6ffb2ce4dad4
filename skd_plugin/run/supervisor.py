"""`skd train`: runs OpenRLHF in a process of its own and shows its progress."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from skd_plugin.config.run import Run
from skd_plugin.run import resume
from skd_plugin.run.lock import owned
from skd_plugin.run.places import link_places
from skd_plugin.run.process import ELSEWHERE, last_error, run_module
from skd_plugin.run.progress import Follower, summary_table
from skd_plugin.run.still import Watch
from skd_plugin.run_folder import RunFolder
from skd_plugin.terminal import plain_console, waiting


def supervise(run: Run) -> int:
    """Runs the recipe to its end. Returns 0, 1 (failed; the last error is printed) or 130 (Ctrl-C).

    Raises:
        RecipeError: another run goes on in the folder, or it cannot be written.
    """
    console = plain_console(soft_wrap=True)
    with owned(run.folder.path, console.print):
        return _supervise(run, console)


def _supervise(run: Run, console: Console) -> int:
    run = after_the_earlier_run(run, console)
    link_places(run)
    run.save()
    folder = run.folder
    console.print(f"Run folder {folder.path}; OpenRLHF's own output goes to {folder.log.name} there")
    for notice in run.notices:
        console.print(notice, markup=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    try:
        status = _train(folder, console)
    except KeyboardInterrupt:
        folder.status.stage("stopped", error="stopped by the user")
        console.print(f"Stopped. {_how_to_go_on(run)}")
        return 130
    if status != 0:
        error = folder.status.read().get("error") or f"OpenRLHF's process ended with status {status}"
        if ELSEWHERE in error:
            error = f"the engine did not start: {last_error(folder.log)}"
        console.print(Text.assemble(("The run failed:", "red"), f" {error}"))
        console.print(f"The whole story is in {folder.log}. {_how_to_go_on(run)}")
        return 1
    console.print(summary_table(folder, time.monotonic() - started))
    what = "student's LoRA adapter" if run.host.get("ds.lora.rank") else "student"
    console.print(f"The {what} is in {folder.model}; everything else is beside it")
    return 0


def after_the_earlier_run(run: Run, console: Console) -> Run:
    """Goes on with an earlier run in the folder where that is possible, or else moves it out of the way."""
    earlier = resume.look_at(run)
    if not earlier.exists:
        return run
    if earlier.step is not None:
        console.print(f"An unfinished run is here; going on from its checkpoint of step {earlier.step}")
        going_on, notes = resume.go_on_from(run, earlier.step)
        for note in notes:
            console.print(note)
        return going_on
    kept = _put_aside(run.folder.path)
    console.print(f"An earlier run was here; {earlier.reason}, so it is now in {kept}")
    return run


def _put_aside(folder: Path) -> Path:
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(kept)


def _train(folder: RunFolder, console: Console) -> int:
    follower, watch = Follower(folder, console), Watch(folder, console.print)
    folder.ray_waits.unlink(missing_ok=True)  # of a killed attempt
    with waiting(console, "starting") as tell:
        command = ["skd_plugin.host.launch", str(folder.path)]

        def look() -> None:
            follower.show_news(tell)
            watch.look()

        status = run_module(command, folder.log, look, name=str(folder.path))
        follower.show_news(tell)
    return status


def _how_to_go_on(run: Run) -> str:
    step = resume.last_step(run)
    if step is None:
        return "No checkpoint was saved (openrlhf.ckpt.save_steps), so the same command starts from the beginning"
    return f"The same command goes on from the checkpoint of step {step}"
