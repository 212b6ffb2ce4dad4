"""The context that an engine of two models needs."""

from __future__ import annotations


def context_needed(max_len: int, draft_len: int) -> int:
    """Tokens of context that the engine needs for sequences of `max_len`.

    vLLM counts the drafts of a step and those it will ask for next, and stops drafting for the whole batch where they
    would not fit.
    """
    return max_len + 2 * draft_len + 1
