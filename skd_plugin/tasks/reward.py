"""OpenRLHF loads this file by path as `reward.remote_url`: the checkers of the tasks as its `reward_func`."""

from __future__ import annotations

from skd_plugin.tasks.label import Label


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, float]:
    """Score of one response; OpenRLHF's `SingleTurnAgentExecutor.execute` asks for one at a time.

    Args:
        queries: prompt and response as text, special tokens included.

    Raises:
        ValueError: there is more than one response, or the label is not one of a task.
    """
    (query,), (prompt,), (text,) = queries, prompts, labels
    label = Label.parse(text)
    task = label.checker()
    if task is None:
        raise ValueError(f"tasks/reward.py scores responses to prompts of a task, but their label is {text!r}")
    score = task.score(query[len(prompt) :].removesuffix(label.end_token), label.answer)
    return {"rewards": score, "scores": score}
