"""The replicas of a server: each request goes to the one with the fewest under way, and again if one fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx
from google.api_core.exceptions import RetryError
from google.api_core.retry_async import AsyncRetry

from skd_plugin.words import first_line

AGAIN = (408, 409, 425, 429)  # statuses of a server that may say something else later, with those from 500 on
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0  # between two attempts; it doubles
SHUN_S = 10.0  # for which a replica that has failed gets a request only where no other has room
CONNECT_S = 10.0


class ServerError(RuntimeError):
    """A server gave no usable answer. The message says which one, and why."""


class _Failed(Exception):
    """One attempt, which is worth another."""


@dataclass
class Replica:
    url: str  # without a path
    under_way: int = 0
    failed_at: float = -SHUN_S  # seconds of the monotonic clock

    @property
    def rank(self) -> tuple[bool, int]:
        """The lowest one is asked."""
        return time.monotonic() - self.failed_at < SHUN_S, self.under_way


class Replicas:
    """Used in one event loop, as an asynchronous context."""

    def __init__(
        self, urls: Sequence[str], *, headers: dict[str, str], timeout_s: float, patience_s: float, in_flight: int
    ) -> None:
        """
        Args:
            headers: of each request; a key may be in them.
            timeout_s: of one attempt.
            patience_s: after which a request that has failed is not sent again.
            in_flight: requests of this object that one replica has at once; the others wait here.
        """
        self.members = [Replica(url) for url in urls]
        self._in_flight, self._patience_s = in_flight, patience_s
        self._places = asyncio.Semaphore(in_flight * len(urls))
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.aclose()

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The content of a good answer.

        Raises:
            ServerError: a replica refused the request, or none has answered within the patience.
        """
        retry = AsyncRetry(
            predicate=lambda error: isinstance(error, _Failed),
            initial=FIRST_WAIT_S,
            maximum=LONGEST_WAIT_S,
            multiplier=2,
            timeout=self._patience_s,
        )
        try:
            return await retry(self._attempt)(path, body)
        except RetryError as error:
            raise ServerError(
                f"no server of the teacher has answered for {self._patience_s:g} s (skd.teacher.server.patience_s): "
                f"{error.cause}. Start it again, and then this run, which goes on from its last checkpoint"
            ) from error.cause

    async def _attempt(self, path: str, body: dict[str, Any]) -> bytes:
        async with self._place() as replica:
            try:
                answer = await self._client.post(replica.url + path, json=body)
            except httpx.TransportError as error:
                replica.failed_at = time.monotonic()
                raise _Failed(f"{replica.url}: {type(error).__name__}: {first_line(error)}") from error
            if answer.status_code in AGAIN or answer.status_code >= 500:
                replica.failed_at = time.monotonic()
                raise _Failed(refusal(replica.url, answer))
            if answer.status_code != httpx.codes.OK:
                raise ServerError(refusal(replica.url, answer))
            return answer.content

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[Replica]:
        """A replica with room for a request, which it has while this is open."""
        async with self._places:  # as many as all replicas have, so that one of them has room
            free = [replica for replica in self.members if replica.under_way < self._in_flight]
            replica = min(free, key=lambda replica: replica.rank)
            replica.under_way += 1
            try:
                yield replica
            finally:
                replica.under_way -= 1


def refusal(url: str, answer: httpx.Response) -> str:
    """What a server has said in place of an answer."""
    return f"{url}: {answer.status_code} {answer.reason_phrase}: {answer.text.strip()[:500]}"
