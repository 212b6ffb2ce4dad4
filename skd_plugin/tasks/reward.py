"""The reward of a run whose prompts are a task's: what the task's checker says of a response.

A recipe names this file as OpenRLHF's `reward.remote_url`, and the rollout actor asks `score_response` itself:
OpenRLHF would hand over prompt and response as one text, out of which no cut gives the response back where a tokenizer
normalises, lower-cases or adds spaces.
"""

from __future__ import annotations

from skd_plugin.tasks.label import Label


def score_response(response: str, label: str) -> float:
    """Score of one response, without its end token.

    Raises:
        ValueError: the label is not one of a task.
    """
    own = Label.parse(label)
    task = own.checker()
    if task is None:
        raise ValueError(f"tasks/reward.py scores responses to prompts of a task, but their label is {label!r}")
    return task.score(response, own.answer)
