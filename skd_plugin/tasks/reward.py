"""OpenRLHF loads this file by path as `reward.remote_url`: the checkers of the tasks as its `reward_func`."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from skd_plugin.tasks import Task, find_task


class Sampling(NamedTuple):
    """How the prompts of one task among several are answered; None is what the run says."""

    top_k: int | None = None
    max_new_tokens: int | None = None


AS_THE_RUN = Sampling()


def make_label(task: str, answer: str, end_token: str, reference: str, sampling: Sampling = AS_THE_RUN) -> str:
    """What the host carries beside a prompt and hands back to `reward_func`."""
    own = {name: value for name, value in sampling._asdict().items() if value is not None}
    record = {"task": task, "answer": answer, "end": end_token, "reference": reference}
    return json.dumps(record | ({"sampling": own} if own else {}))


def _record(label: Any) -> dict[str, Any]:
    """The JSON object that a label is; empty for any other label."""
    try:
        record = json.loads(label)
    except (json.JSONDecodeError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def reference_of(label: Any) -> str | None:
    """The reference that a label holds: its entry "reference" if it is a JSON object with one, else the label itself.

    None where the label is no text, or empty.
    """
    text = _record(label).get("reference", label)
    return text if isinstance(text, str) and text else None


def task_of(label: Any) -> Task | None:
    """The task whose label it is; None for a label that is not ours."""
    return find_task(_record(label)["task"])() if _is_ours(label) else None


def sampling_of(label: Any) -> Sampling:
    return Sampling(**_record(label).get("sampling", {})) if _is_ours(label) else AS_THE_RUN


def _is_ours(label: Any) -> bool:
    return {"task", "answer"} <= _record(label).keys()


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
