"""A reward that does not come is an error.

OpenRLHF's executors log a failed reward and go on without one; training would then go on with fewer rewards than
responses, or with none.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

FETCHERS = ("_fetch_rewards_via_func", "_fetch_rewards_via_http")  # of OpenRLHF's single-turn executor


class RewardError(RuntimeError):
    """A reward function, server or agent gave no usable reward. The message says for which prompt and why."""


class RewardedExecutor(AgentExecutorBase):
    """Runs OpenRLHF's or the user's executor and insists on a finite reward within the time limit."""

    def __init__(self, inner: AgentExecutorBase, timeout_s: float) -> None:
        self._inner = inner
        self._failure: ContextVar[str] = ContextVar("reward failure", default="it returned none")
        for name in FETCHERS:
            if hasattr(inner, name):
                setattr(inner, name, self._watched(getattr(inner, name), timeout_s))

    async def execute(self, prompt: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = await self._inner.execute(prompt, *args, **kwargs)
        reward = response["reward"]
        if reward is None:
            raise RewardError(f"no reward for the prompt {prompt[:80]!r}: {self._failure.get()}")
        if not math.isfinite(float(reward)):
            raise RewardError(f"the reward for the prompt {prompt[:80]!r} is {float(reward)}; it must be finite")
        return response

    def _watched(self, fetch: Callable[..., Awaitable[Any]], timeout_s: float) -> Callable[..., Awaitable[Any]]:
        """OpenRLHF swallows what `fetch` raises, so it is noted first; the note belongs to the sample's own task."""

        async def fetch_or_note(*args: Any) -> Any:
            try:
                return await asyncio.wait_for(fetch(*args), timeout_s)
            except TimeoutError:
                self._failure.set(f"it took longer than skd.objective.reward_timeout_s = {timeout_s:g}")
                raise
            except Exception as error:
                self._failure.set(f"{type(error).__name__}: {error}")
                raise

        return fetch_or_note
