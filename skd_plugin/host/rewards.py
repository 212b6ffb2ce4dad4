"""A reward that does not come, or is no number, is an error.

OpenRLHF's executors log a failed reward and go on without one; training would then go on with fewer rewards than
responses, or with none.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

from skd_plugin.tasks.reward import score_response

FETCHERS = ("_fetch_rewards_via_func", "_fetch_rewards_via_http")  # of OpenRLHF's single-turn executor


class RewardError(RuntimeError):
    """A reward function, server or agent gave no usable reward. The message says for which prompt and why."""


class TaskRewards(AgentExecutorBase):
    """OpenRLHF's single-turn executor without a reward of its own, and the score of a task's checker for what it
    sampled: the response's ids, decoded by themselves.
    """

    def __init__(self, inner: AgentExecutorBase, text_of: Callable[[Sequence[int]], str], timeout_s: float) -> None:
        self._inner, self._text_of, self._timeout_s = inner, text_of, timeout_s

    async def execute(self, prompt: str, label: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = await self._inner.execute(prompt, label, *args, **kwargs)
        ((start, end),) = response["action_ranges"]
        text = self._text_of(response["observation_tokens"][start:end])
        try:
            score = await asyncio.wait_for(asyncio.to_thread(score_response, text, label), self._timeout_s)
        except TimeoutError as error:
            raise RewardError(f"no reward for the prompt {prompt[:80]!r}: {_too_long(self._timeout_s)}") from error
        return response | {"reward": score, "scores": score}


class RewardedExecutor(AgentExecutorBase):
    """Runs OpenRLHF's or the user's executor and insists on a finite reward within the time limit."""

    def __init__(self, inner: AgentExecutorBase, timeout_s: float, source: str) -> None:
        """`source`: where rewards come from, for errors."""
        self._inner, self._source = inner, source
        self._failure: ContextVar[str] = ContextVar("reward failure", default="it returned none")
        for name in FETCHERS:
            if hasattr(inner, name):
                setattr(inner, name, self._watched(getattr(inner, name), timeout_s))

    async def execute(self, prompt: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = await self._inner.execute(prompt, *args, **kwargs)
        if response["reward"] is None:
            raise RewardError(f"no reward for the prompt {prompt[:80]!r} from {self._source}: {self._failure.get()}")
        try:
            return response | _numbers(response["reward"], response.get("scores"), response.get("extra_logs") or {})
        except ValueError as error:
            raise RewardError(f"{error}, for the prompt {prompt[:80]!r}, from {self._source}") from error

    def _watched(self, fetch: Callable[..., Awaitable[Any]], timeout_s: float) -> Callable[..., Awaitable[Any]]:
        """OpenRLHF swallows what `fetch` raises, so it is noted first; the note belongs to the sample's own task."""

        async def fetch_or_note(*args: Any) -> Any:
            try:
                return await asyncio.wait_for(fetch(*args), timeout_s)
            except TimeoutError:
                self._failure.set(_too_long(timeout_s))
                raise
            except Exception as error:
                self._failure.set(f"{type(error).__name__}: {error}")
                raise

        return fetch_or_note


def _too_long(timeout_s: float) -> str:
    return f"it took longer than skd.objective.reward_timeout_s = {timeout_s:g}"


def _numbers(reward: Any, scores: Any, extra_logs: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError for one that is not one finite number."""
    number = one_number(reward, "the reward")
    return {
        "reward": number,
        "scores": number if scores is None else one_number(scores, "the score"),
        "extra_logs": {name: one_number(value, f"'{name}' of extra_logs") for name, value in extra_logs.items()},
    }


def one_number(value: Any, what: str) -> float:
    """A number however it is wrapped: bool, int, a scalar of numpy or torch, or a list or array that holds one, as a
    reward server sends for one query.

    Raises:
        ValueError: it is not one number, or not a finite one.
    """
    inner = value
    if hasattr(inner, "tolist"):  # numpy's and torch's
        inner = inner.tolist()
    while isinstance(inner, list | tuple) and len(inner) == 1:
        inner = inner[0]
    if not isinstance(inner, int | float):
        raise ValueError(f"{what} is {str(value)[:80]!r} ({type(value).__name__}), but must be one number")
    if not math.isfinite(inner):
        raise ValueError(f"{what} is {float(inner)}; it must be finite")
    return float(inner)
