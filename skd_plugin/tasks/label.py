"""What travels beside a prompt through OpenRLHF, as a text: the reference, and what its task's checker needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from skd_plugin.tasks import Task, find_task


class Sampling(NamedTuple):
    """How the prompts of one task among several are answered; None is what the run says."""

    top_k: int | None = None
    max_new_tokens: int | None = None


AS_THE_RUN = Sampling()
MARK = ("made_by", "skd_plugin")  # entry of every label of ours; a user's own may have any other


@dataclass(frozen=True)
class Label:
    """Ours is a JSON object with a mark; any other text is a user's, for a reward of theirs."""

    reference: str | None  # a correct response, without the end token
    task: str | None = None  # by which `find_task` finds the class; None: the label is not one of ours
    answer: str = ""  # what the task's checker compares with
    end_token: str = ""
    sampling: Sampling = AS_THE_RUN

    @classmethod
    def parse(cls, label: object) -> Label:
        """Never fails: the reference of a user's label is its entry "reference" if it is a JSON object with one, else
        the label itself; None where that is no text, or empty.
        """
        record = _json_object(label)
        text = record.get("reference", label)
        reference = text if _is_text(text) else None
        if MARK not in record.items() or not {"task", "answer"} <= record.keys():
            return cls(reference)
        sampling = Sampling(**record.get("sampling", {}))
        return cls(reference, record["task"], record["answer"], record.get("end", ""), sampling)

    def to_json(self) -> str:
        own = {name: value for name, value in self.sampling._asdict().items() if value is not None}
        record = {
            MARK[0]: MARK[1],
            "task": self.task,
            "answer": self.answer,
            "end": self.end_token,
            "reference": self.reference,
        }
        return json.dumps(record | ({"sampling": own} if own else {}))

    def checker(self) -> Task | None:
        """The task whose label it is; None for a label that is not ours."""
        return find_task(self.task)() if self.task is not None else None


def _is_text(value: object) -> bool:
    """Whether it is one, with something in it, that a tokenizer takes: JSON can name half of a character."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_object(label: object) -> dict[str, Any]:
    """Empty for a label that is none."""
    try:
        record = json.loads(label) if isinstance(label, str) else None
    except (ValueError, RecursionError):  # also a number of 5,000 digits, and brackets 100,000 deep
        return {}
    return record if isinstance(record, dict) else {}
