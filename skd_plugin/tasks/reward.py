"""OpenRLHF loads this file by path as `reward.remote_url`: the checkers of the tasks as its `reward_func`."""

from __future__ import annotations

import json

from skd_plugin.tasks import TASKS


def make_label(task: str, answer: str, end_token: str) -> str:
    """What the host carries beside a prompt and hands back to `reward_func`."""
    return json.dumps({"task": task, "answer": answer, "end": end_token})


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, float]:
    """Score of one response; the host asks for one at a time.

    Args:
        queries: prompt and response as text, special tokens included.
    """
    (query,), (prompt,), (label,) = queries, prompts, labels
    wanted = json.loads(label)
    response = query[len(prompt) :].removesuffix(wanted["end"])
    score = TASKS[wanted["task"]]().score(response, wanted["answer"])
    return {"rewards": score, "scores": score}
