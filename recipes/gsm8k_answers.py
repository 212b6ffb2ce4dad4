"""Whether a response ends with GSM8K's answer. OpenRLHF loads this file by path as `reward.remote_url`."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, float]:
    """Score of one response; the host asks for one at a time.

    Args:
        queries: prompt and response as text.
        labels: the reference solution, which ends with "#### " and the answer.
    """
    (query,), (prompt,), (label,) = queries, prompts, labels
    score = float(last_number(query[len(prompt) :]) == last_number(label.rsplit("####", 1)[-1]))
    return {"rewards": score, "scores": score}
