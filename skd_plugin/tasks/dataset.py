"""Tasks whose examples are rows of a dataset: from the Hugging Face Hub, or from a folder with the same columns."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from skd_plugin.damage import bad_texts, why_not_read
from skd_plugin.tasks.base import Example, Task, TaskError, check_split, split_of
from skd_plugin.words import root_cause

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
Row = Mapping[str, Any]


class DatasetTask(Task):
    """What such tasks share; a subclass names its dataset and says what of a row is the reference and the label.

    Args:
        path: a folder that holds `train` and `test` as .json, .jsonl or .parquet; None takes the Hub's.
        template: form of the prompt, with the names of columns in braces; None is the task's own.
    """

    dataset: ClassVar[str]  # name on the Hub
    subset: ClassVar[str | None] = None
    splits: ClassVar[Mapping[str, str]] = MappingProxyType({"train": "train", "test": "test"})  # ours -> the dataset's
    options = ("path", "template")
    cut_by_hash: ClassVar[bool] = False  # the dataset has one split: a hash of the prompt makes two of it
    template: str

    def __init__(self, path: str | None = None, template: str | None = None) -> None:
        self._path = path
        self.template = template or self.template

    def target(self, row: Row) -> tuple[str, str] | None:
        """Reference and label of a row; None where the row is of no use."""
        raise NotImplementedError

    def merge(self, known: Example, again: Example) -> Example:
        """One example of two rows with the same prompt. The first one stays, unless a subclass knows better."""
        return known

    def examples(self, split: str, count: int | None, seed: int = 0) -> list[Example]:
        """In an order drawn by `seed`, so that the first 100 of 1,000 are those of 100."""
        check_split(split)
        found: dict[str, Example] = {}
        wanted = self._columns_of_the_template()
        for number, row in enumerate(self.rows(split), start=1):
            try:
                example = self._example(row, wanted)
            except TaskError as error:
                raise TaskError(f"{self._path or self.dataset}, row {number} of {split}: {error}") from error
            if example is None or (self.cut_by_hash and split_of(example.prompt) != split):
                continue
            known = found.get(example.prompt)
            found[example.prompt] = self.merge(known, example) if known else example
        examples = list(found.values())
        if count is not None and count > len(examples):
            raise TaskError(
                f"task {self.name} has {len(examples)} {split} prompts, but {count} are asked for; ask for fewer, or "
                "for 'full'"
            )
        random.Random(f"{self.name}/{split}/{seed}").shuffle(examples)
        return examples[:count]

    def rows(self, split: str) -> Iterable[Row]:
        """Rows of the dataset's split.

        Raises:
            TaskError: there is no such split, no such file, or the Hub cannot be reached.
        """
        if self.cut_by_hash:
            split = "train"
        if self._path is not None:
            return _local_rows(Path(self._path), split)
        return self.hub_rows(split, self.subset)

    def hub_rows(self, split: str, subset: str | None) -> Iterable[Row]:
        """Raises TaskError: the dataset has no such split, or the Hub cannot be reached."""
        from datasets import load_dataset

        if split not in self.splits:
            raise TaskError(f"task {self.name} has no {split} prompts: it is for {' and '.join(self.splits)} only")
        try:
            return load_dataset(self.dataset, subset, split=self.splits[split])
        except Exception as error:  # offline, gated, moved, a script, damaged: whatever it is, there are no rows
            raise TaskError(
                f"{self.dataset} cannot be loaded from the Hub: {root_cause(error)}. Log in if it is gated, or put "
                "its files into a folder and name that as skd.task.path"
            ) from error

    def _columns_of_the_template(self) -> list[str]:
        try:
            places = [place[1:3] for place in string.Formatter().parse(self.template) if place[1] is not None]
        except ValueError as error:  # a single brace
            raise TaskError(self._of_the_template(str(error))) from error
        for name, form in places:
            if form:  # such as a width that no memory holds
                raise TaskError(self._of_the_template(f"'{name}' has '{form}' behind it"))
        return [name for name, _ in places if name is not None]

    def _example(self, row: Row, wanted: Sequence[str]) -> Example | None:
        """None for a row that is of no use."""
        for name in wanted:
            if name not in row:
                raise TaskError(f"it has no column '{name}' of {self.name}'s prompt; it has {', '.join(row)}")
            if row[name] is None:
                raise TaskError(f"'{name}' of {self.name}'s prompt is missing or null")
        try:
            prompt = self.template.format(**row)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise TaskError(self._of_the_template(f"{type(error).__name__}: {error}")) from error
        target = self.target(row)
        return None if target is None else Example(prompt, *target)

    def _of_the_template(self, reason: str) -> str:
        return (
            f"skd.task.template is {self.template!r:.200}, in which only names of columns may stand in braces; write "
            f"{{{{ and }}}} for braces that are text ({reason})"
        )


def column(row: Row, name: str) -> Any:
    """Value of a column that a task needs.

    Raises:
        TaskError: there is none.
    """
    if name not in row:
        raise TaskError(f"a row has no column '{name}'; it has {', '.join(row)}")
    return row[name]


def text(row: Row, name: str) -> str:
    """Text in a column that a task needs.

    Raises:
        TaskError: there is no such column, or no text in it.
    """
    found = column(row, name)
    if found is None or not isinstance(found, str | int | float):
        raise TaskError(f"'{name}' is {'missing or null' if found is None else repr(found)[:60]}, but must be a text")
    return str(found)


def _local_rows(folder: Path, split: str) -> Iterable[Row]:
    from datasets import load_dataset

    found = [folder / f"{split}{ending}" for ending in FORMATS if (folder / f"{split}{ending}").is_file()]
    if not found:
        *others, last = (f"{split}{ending}" for ending in FORMATS)
        raise TaskError(f"skd.task.path: {folder} has no {', '.join(others)} or {last}")
    (path, *_) = found
    try:
        rows = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # of `datasets`, Arrow, pandas: whatever it is, there are no rows
        raise TaskError(f"skd.task.path: {path} cannot be read: {why_not_read(path, error)}") from error
    if wrong := bad_texts(path, rows):
        raise TaskError(f"skd.task.path: {path} cannot be read: {wrong}")
    return rows
