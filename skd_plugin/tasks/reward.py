"""OpenRLHF loads this file by path as `reward.remote_url`: the checkers of the tasks as its `reward_func`."""

from __future__ import annotations

import json
from typing import Any

from skd_plugin.tasks import Task, find_task


def make_label(task: str, answer: str, end_token: str, reference: str) -> str:
    """What the host carries beside a prompt and hands back to `reward_func`."""
    return json.dumps({"task": task, "answer": answer, "end": end_token, "reference": reference})


def reference_of(label: Any) -> str | None:
    """The reference that a label holds: its entry "reference" if it is a JSON object with one, else the label itself.

    None where the label is no text, or empty.
    """
    if not isinstance(label, str):
        return None
    try:
        record = json.loads(label)
    except json.JSONDecodeError:
        record = None
    text = record["reference"] if isinstance(record, dict) and "reference" in record else label
    return text if isinstance(text, str) and text else None


def task_of(label: Any) -> Task | None:
    """The task whose label it is; None for a label that is not ours."""
    try:
        record = json.loads(label)
    except (json.JSONDecodeError, TypeError):
        return None
    return find_task(record["task"])() if isinstance(record, dict) and {"task", "answer"} <= record.keys() else None


def answer_of(label: str) -> str:
    """What the task's checker compares with, of a label that is ours."""
    return json.loads(label)["answer"]


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, float]:
    """Score of one response; the host asks for one at a time.

    Args:
        queries: prompt and response as text, special tokens included.
    """
    (query,), (prompt,), (label,) = queries, prompts, labels
    wanted = json.loads(label)
    response = query[len(prompt) :].removesuffix(wanted["end"])
    score = find_task(wanted["task"])().score(response, wanted["answer"])
    return {"rewards": score, "scores": score}
