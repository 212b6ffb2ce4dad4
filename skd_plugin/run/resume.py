"""A run that was cut off goes on from its last checkpoint when the same command is given again.

What a killed run can leave: lines of steps after the checkpoint, a half-written line, a half-written checkpoint, an
actor's checkpoint without the critic's, and a `latest` file that names any of these. A power cut can leave any file
empty or full of zero bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from skd_plugin.config.run import DATA_DIGEST, Run
from skd_plugin.errors import RecipeError
from skd_plugin.run_folder import replace_text
from skd_plugin.words import root_cause

# Options that change nothing of what is learned: where it is logged, and how a teacher elsewhere is asked.
WITHOUT_EFFECT = ("openrlhf.logger.", "skd.teacher.server.")
URL = "skd.teacher.url"
METRIC_FILE = "metric.json"  # OpenRLHF writes it into a checkpoint when all ranks have written theirs
GROUPS = ("_actor", "_critic")  # folders of checkpoints, by OpenRLHF's names


@dataclass(frozen=True)
class Earlier:
    """What is in a run folder: nothing, a finished run, or one that was cut off."""

    exists: bool = False
    step: int | None = None  # of the checkpoint to go on from
    reason: str = ""  # why it is not gone on with


def look_at(run: Run) -> Earlier:
    """Whether the run in the folder can be gone on with; changes nothing.

    Raises:
        RecipeError: its checkpoints may be somebody else's.
    """
    if not run.folder.metrics.path.exists():
        return Earlier()
    reason = "" if run.host.get("ckpt.load_enable") else _why_not(run)  # the user may say so, whatever has changed
    if reason:
        return Earlier(True, reason=reason)
    step = last_step(run)
    if step is not None and not run.host.get("ckpt.load_enable"):
        _check_owner(run)
    return Earlier(True, step, "" if step else "it had no checkpoint yet")


def _check_owner(run: Run) -> None:
    """DeepSpeed's checkpoints are pickles, which run what is in them when they are loaded."""
    for group in _groups(run):
        for path in (group, *group.rglob("*")):
            status = path.lstat()
            owner = "belongs to another user" if status.st_uid != os.geteuid() else ""
            if not stat.S_ISLNK(status.st_mode) and status.st_mode & stat.S_IWOTH:
                owner = "can be written by every user of this machine"
            if owner:
                raise RecipeError(
                    f"the checkpoint {path} {owner}, and to load it is to run what is in it. If you trust it, set "
                    "openrlhf.ckpt.load_enable=true; else name another skd.run_dir"
                )


def _why_not(run: Run) -> str:
    """Why this run is another one than that in the folder; empty where it is not."""
    folder = run.folder
    if folder.status.read().get("stage") == "done":
        return "it is finished"
    if not run.skd.resume:
        return "skd.resume is false"
    if not folder.config.exists():
        return f"its recipe was another one ({folder.config.name} is missing)"
    reasons = []
    try:
        before, now = Run.load(folder).flat_options(), run.flat_options()
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:  # whatever is in the file
        return f"its {folder.config.name} cannot be read ({root_cause(error, 100)})"
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    changed = {key for key in changed if not key.startswith(WITHOUT_EFFECT)} - {"openrlhf.ckpt.load_enable"}
    if before.get(URL) and now.get(URL):
        changed.discard(URL)  # the servers of the teacher have moved
    if changed:
        reasons.append(f"its recipe was another one ({', '.join(sorted(changed))})")
    before_it = run.data_digest  # of runs that have written none
    if folder.read_config().get(DATA_DIGEST, before_it) != run.data_digest:
        reasons.append("its data were others (the prompts have changed)")
    return " and ".join(reasons)


def go_on_from(run: Run, step: int) -> tuple[Run, list[str]]:
    """Brings the folder back to what it was after `step`.

    Returns:
        The run that goes on from there, and sentences about what could not be read and was put aside.
    """
    for group in _groups(run):
        for tag, number in _tags(group).items():
            if number > step or not _is_complete(group / tag):
                shutil.rmtree(group / tag)
        newest = max(_tags(group).items(), key=lambda item: (item[1], item[0]))[0]
        replace_text(group / "latest", newest)
    notes = [note for lines in (run.folder.metrics, run.folder.traces) for note in lines.cut_after(step)]
    return replace(run, host={**run.host, "ckpt.load_enable": True}), notes + run.folder.status.put_aside()


def last_step(run: Run) -> int | None:
    """The newest step of which every group of models has a whole checkpoint."""
    steps = [{n for tag, n in _tags(group).items() if _is_complete(group / tag)} for group in _groups(run)]
    return max(set.intersection(*steps), default=None)


def _groups(run: Run) -> list[Path]:
    needed = GROUPS if run.host.get("algo.advantage.estimator") == "gae" else GROUPS[:1]
    return [run.folder.checkpoints / name for name in needed]


def _tags(group: Path) -> dict[str, int]:
    """Checkpoint folders and their steps: "global_step20", and "best_global_step20" of the best evaluation."""
    if not group.is_dir():
        return {}
    found = ((path.name, re.fullmatch(r"(?:best_)?global_step(\d+)", path.name)) for path in group.iterdir())
    return {name: int(match[1]) for name, match in found if match}


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / METRIC_FILE).exists()
