"""A run that does not move says what it waits for, and goes on waiting: Ctrl-C is the user's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from huggingface_hub.constants import HF_HUB_CACHE

from skd_plugin.run.process import last_error, processes_of
from skd_plugin.run_folder import RunFolder
from skd_plugin.words import duration

STILL_S = 120.0  # without another stage, step or evaluation; docs/faq.md names it


class Watch:
    """Tells once a stage that nothing has moved for `STILL_S`, and again when what is waited for is another thing."""

    def __init__(self, folder: RunFolder, tell: Callable[[str], None]) -> None:
        """Args: tell: called with a line."""
        self._folder, self._tell = folder, tell
        self._stage, self._size = "", -1  # of metrics.jsonl, in bytes
        self._since = self._next = 0.0
        self._told: str | None = None

    def look(self) -> None:
        metrics, now = self._folder.metrics.path, time.monotonic()
        stage = str(self._folder.status.read().get("stage", "starting"))
        size = metrics.stat().st_size if metrics.exists() else 0
        if stage != self._stage:
            self._told = None
        if (stage, size) != (self._stage, self._size):
            self._stage, self._size, self._since, self._next = stage, size, now, now + STILL_S
        elif now >= self._next:
            self._next = now + STILL_S
            waits = "; ".join(self._waits_for())
            if waits != self._told:
                self._told = waits
                self._tell(
                    f"Nothing has moved for {duration(now - self._since)} at the stage '{stage}': "
                    f"{waits or f'no lock and no resource is missing; its log ends with: {self._last_line()}'}. "
                    "It goes on waiting; Ctrl-C stops it"
                )

    def _waits_for(self) -> Iterator[str]:
        if self._folder.ray_waits.exists():
            yield self._folder.ray_waits.read_text()
        yield from build_locks(extensions())
        yield from hub_locks(Path(HF_HUB_CACHE), {process.pid for process in processes_of(str(self._folder.path))})

    def _last_line(self) -> str:
        return (last_error(self._folder.log) if self._folder.log.exists() else None) or "none yet"


def extensions() -> Path:
    """Where torch builds its extensions; in a folder for each version of Python, where it is the default."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def build_locks(root: Path) -> Iterator[str]:
    """Locks under which torch builds an extension. Who finds one waits until it is gone; its maker holds it open."""
    for path in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        holder = _who_has_open(path)
        if holder is None:
            yield f"{path} is the lock of a build that was killed: nobody holds it; remove it"
        else:
            yield f"{holder} builds an extension of torch and holds {path}"


def hub_locks(hub: Path, own: set[int]) -> Iterator[str]:
    """Locks of downloads that processes outside the run hold."""
    held = _held_by()
    for path in (hub / ".locks").rglob("*.lock"):
        pid = held.get(path.stat().st_ino)
        if pid is not None and pid not in own:
            yield f"process {pid} downloads from the Hub and holds {path}"


def _who_has_open(path: Path) -> str | None:
    for process in psutil.process_iter():
        try:
            if any(file.path == str(path) for file in process.open_files()):
                return f"process {process.pid} ({process.name()})"
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def _held_by() -> dict[int, int]:
    """Inode of a file that is locked as a whole (flock) -> the process that has locked it (Linux only)."""
    table = Path("/proc/locks")
    held = {}
    for line in table.read_text().splitlines() if table.exists() else ():
        fields = line.split()
        if fields[1] == "FLOCK":
            held[int(fields[5].rpartition(":")[2])] = int(fields[4])
    return held
