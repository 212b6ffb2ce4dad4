"""The context that an engine of two models needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def engine_len(options: Mapping[str, Any], longest_teacher_prompt: int | None) -> int:
    """Tokens of the longest sequence of the engine, which holds the teacher's prompt where that is another one.

    Args:
        options: OpenRLHF's, with the limit on a response.
        longest_teacher_prompt: None: it is as long as the student's may be.
    """
    max_len = options["data.max_len"]
    if longest_teacher_prompt is None:
        return max_len
    agent = options["train.agent_func_path"]  # whose turns fill what there is
    response = max_len if agent else options["rollout.max_new_tokens"] or max_len
    return max(max_len, longest_teacher_prompt + response)


def context_needed(max_len: int, draft_len: int) -> int:
    """Tokens of context that the engine needs for sequences of `max_len`.

    vLLM counts the drafts of a step and those it will ask for next, and stops drafting for the whole batch where they
    would not fit.
    """
    return max_len + 2 * draft_len + 1
