"""The folder of a run: what is in it, and how it is written and read. `skd train` and its children write, all read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from skd_plugin.errors import RecipeError

Record = dict[str, Any]  # a line of JSON


def replace_text(path: Path, text: str) -> None:
    """Replaces a file in one move, so that a reader never finds half of it."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)


class LeftOut:
    """What a reader leaves out of a file of lines, and why: whoever sees the rest is told."""

    REASONS = 12  # that are told one by one
    LINES = 5  # of each

    def __init__(self, file: str) -> None:
        self.file = file
        self.unread = ""  # why the file could not be read to its end
        self._lines: dict[tuple[str, str], list[int]] = {}

    def add(self, thing: str, why: str, line: int) -> None:
        """Args: thing: what is left out of line number `line`, one word."""
        self._lines.setdefault((thing, why), []).append(line)

    def notes(self) -> list[str]:
        """A sentence a reason, with how many things and the first of their lines."""
        told = list(self._lines.items())
        notes = [f"{self.file} cannot be read: {self.unread}."] if self.unread else []
        for (thing, why), lines in told[: self.REASONS]:
            more = ", ..." if len(lines) > self.LINES else ""
            number = f"{len(lines):,} {thing}{'' if len(lines) == 1 else 's'}"
            places = ", ".join(map(str, lines[: self.LINES])) + more
            notes.append(f"{self.file}: {number} left out: {why} (line {places}).")
        if rest := sum(len(lines) for _, lines in told[self.REASONS :]):
            notes.append(f"{self.file}: {rest:,} more left out, for {len(told) - self.REASONS:,} other reasons.")
        return notes


def out_file(name: str) -> Path:
    """The file that --out names, with its folder made: asked for before the work, whose result would be lost.

    Raises:
        RecipeError: it cannot be written.
    """
    path = Path(name)
    try:
        if path.is_dir():
            raise RecipeError(f"--out {name} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {name} cannot be written: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RecipeError(f"--out {name} cannot be written: it is not yours to write")
    return path


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON with its end. JSON has neither NaN nor infinity: a number that does not exist is null.

    Arrays of numpy are lists in it, their numbers as short as their type allows.
    """
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _record(line: bytes) -> Record | None:
    """A line of JSON; None where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # of JSON, of UTF-8, of a number; nested too deep
        return None
    return found if isinstance(found, dict) else None


def _what_is_wrong(line: bytes) -> str:
    """In words, of a line that is no record."""
    return "no record of JSON" if line.endswith(b"\n") else "half written"


def damaged(path: Path) -> Path:
    """Where what cannot be read of a file is kept, when the file is written again."""
    return path.with_name(f"{path.name}.damaged")


@dataclass(frozen=True)
class JsonLines:
    """A file to which whole lines are appended. Its last line may be half written: of a run that goes on or was cut
    off. After a power cut or an edit other lines may be no records: `scan` says which, `cut_after` puts them aside."""

    path: Path

    def append(self, record: Mapping[str, Any]) -> None:
        line = json_line(record)
        with self.path.open("ab") as file:
            file.write(line)

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes the file anew, with its folder where that is missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(self.path, b"".join(json_line(record) for record in records))

    def read(self) -> list[Record]:
        """The record of every whole line that is one; none where there is no file."""
        return self.read_from(0)[0]

    def read_from(self, offset: int) -> tuple[list[Record], int]:
        """Likewise of the lines from byte `offset` on, and the offset to go on from."""
        if not self.path.exists():
            return [], offset
        with self.path.open("rb") as file:
            file.seek(offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        records = (_record(line) for line in whole.split(b"\n"))
        return [record for record in records if record is not None], offset + len(whole)

    def scan(self, left_out: LeftOut) -> Iterator[tuple[int, Record]]:
        """(line number, record) one after the other, of a file that may have been cut or edited: a line that is no
        record goes to `left_out`. Nothing where there is no file."""
        if not self.path.is_file():
            return
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    record = _record(line)
                    if record is not None:
                        yield number, record
                    elif line.strip():
                        left_out.add("line", _what_is_wrong(line), number)
        except OSError as error:
            left_out.unread = error.strerror or type(error).__name__

    def count(self) -> int:
        """Lines of the file, whole or not."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            return sum(1 for _ in file)

    def cut_after(self, step: int) -> list[str]:
        """Keeps the records up to `step`: those after it will be written again. What is no record of a step goes to
        `damaged`.

        Returns:
            Sentences about what was put there.
        """
        if not self.path.exists():
            return []
        left_out, kept, aside = LeftOut(self.path.name), [], []
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _record(line) if line.endswith(b"\n") else None
                found = None if record is None else record.get("step")
                if type(found) is int:
                    kept += [line] if found <= step else []
                elif line.strip():
                    why = _what_is_wrong(line) if record is None else "its step is no whole number"
                    left_out.add("line", why, number)
                    aside.append(line)
        if aside:
            with damaged(self.path).open("ab") as file:
                file.write(b"".join(aside).removesuffix(b"\n") + b"\n")
        replace_bytes(self.path, b"".join(kept))
        return [f"{note[:-1]}; kept in {damaged(self.path).name}." for note in left_out.notes()]


class Status:
    """How far a run is, in one small file of its folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "status.json"

    def read(self) -> Record:
        """Empty where there is no file, or none that can be read (`put_aside`)."""
        return (_record(self.path.read_bytes()) if self.path.exists() else None) or {}

    def put_aside(self) -> list[str]:
        """Moves a file that is no status, as a power cut leaves it, to `damaged`; returns a sentence about it."""
        if not self.path.exists() or _record(self.path.read_bytes()) is not None:
            return []
        os.replace(self.path, damaged(self.path))
        return [f"{self.path.name} is no record of JSON; kept in {damaged(self.path).name}."]

    def stage(self, name: str, **facts: Any) -> None:
        kept = {key: value for key, value in self.read().items() if key != "error"}  # of an earlier attempt
        content = {**kept, "stage": name, **facts}
        replace_text(self.path, json.dumps(content))


@dataclass(frozen=True)
class RunFolder:
    """Every path in a run folder, and the records in it."""

    path: Path

    @property
    def config(self) -> Path:
        """Every option of the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> JsonLines:
        """A line a training step, and a line an evaluation."""
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def traces(self) -> JsonLines:
        """A line a response: skd.traces_per_step of each step."""
        return JsonLines(self.path / "traces.jsonl")

    @property
    def status(self) -> Status:
        return Status(self.path)

    @property
    def ray_waits(self) -> Path:
        """What Ray has too little of; there only while it waits for that."""
        return self.path / "ray_waits.txt"

    @property
    def log(self) -> Path:
        """What OpenRLHF, Ray and vLLM print."""
        return self.path / "host.log"

    @property
    def model(self) -> Path:
        """The finished student."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events(self) -> Path:
        """TensorBoard's."""
        return self.path / "tensorboard"

    def prompts(self, split: str) -> JsonLines:
        """The prompts that a task has made for "train" or "test"."""
        return JsonLines(self.path / "data" / f"{split}.jsonl")

    def read_config(self) -> Record:
        return yaml.safe_load(self.config.read_text())

    def write_config(self, content: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.config, yaml.safe_dump(dict(content), sort_keys=False))
