"""A teacher on an OpenAI-style server of vLLM, which reads finished texts: `prompt_logprobs` of /v1/completions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pydantic_core
import torch

from skd_plugin.config.schema import TeacherConfig
from skd_plugin.core.reading import Reading
from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.core.trace import NOTHING, Trace
from skd_plugin.errors import RecipeError
from skd_plugin.served.replicas import Replicas, ServerError

COMPLETIONS = "/v1/completions"
LOWEST = -9999.0  # what vLLM writes for a log-probability of minus infinity, which JSON does not know


@dataclass(frozen=True)
class Server:
    """Where a teacher is, and how it is asked. Nothing secret is in it."""

    urls: tuple[str, ...]
    model: str  # its name there
    key_env: str | None  # environment variable that holds the key
    timeout_s: float  # of one request
    patience_s: float  # of a request and its repetitions
    in_flight: int  # requests that one replica has at once of each engine
    top_k: int  # teacher entries kept a token

    @classmethod
    def of(cls, teacher: TeacherConfig, top_k: int) -> Server:
        server = teacher.server
        model = server.model or teacher.model_name_or_path
        return cls(teacher.urls, model, server.key_env, server.timeout_s, server.patience_s, server.in_flight, top_k)

    @property
    def command(self) -> str:
        """The line that starts such a server."""
        return f"vllm serve {self.model} --max-logprobs {self.top_k}"

    def headers(self) -> dict[str, str]:
        """The key, where there is one; it is read anew each time, and kept nowhere.

        Raises:
            RecipeError: the environment does not have it.
        """
        if self.key_env is None:
            return {}
        if not os.environ.get(self.key_env):
            raise RecipeError(
                f"skd.teacher.server.key_env names the environment variable {self.key_env}, which is not set in this "
                "process; export it where skd is started, and on a cluster where Ray was started on each node"
            )
        return {"Authorization": f"Bearer {os.environ[self.key_env]}"}

    def question(self, prompt: Sequence[int] | str, **others: Any) -> dict[str, Any]:
        """A request to read a text and write one token, which is less than a server will do."""
        return {"model": self.model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": self.top_k, **others}


class ServedTeacher:
    """Used in one event loop, as an asynchronous context."""

    def __init__(self, server: Server, vocab_size: int) -> None:
        """`vocab_size`: ids that both models have."""
        self._server, self._vocab_size = server, vocab_size
        self.replicas = Replicas(
            server.urls,
            headers=server.headers(),
            timeout_s=server.timeout_s,
            patience_s=server.patience_s,
            in_flight=server.in_flight,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.replicas.__aexit__(*error)

    async def read(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Reading:
        """Raises ServerError where no server has read it."""
        ids = [*prompt_ids, *response_ids]
        if not response_ids:
            return reading_of([], [], self._server.top_k, self._vocab_size)
        answer = await self.replicas.post(COMPLETIONS, self._server.question(ids))
        return await asyncio.to_thread(self._parse, answer, ids, len(prompt_ids))

    async def trace_of(self, prompt_ids: Sequence[int], trace: Trace) -> Trace:
        """The trace of what a student has written behind a prompt, with what the teacher says of it (Reading.on)."""
        return (await self.read(prompt_ids, trace.response_ids.tolist())).on(trace)

    async def write(
        self, prompt_ids: Sequence[int], settings: SamplingSettings, limit: int, seed: int, end_ids: Sequence[int]
    ) -> list[int]:
        """Token ids of a response by the teacher; the token that ended it is among them.

        Raises:
            ServerError: no server has written one.
        """
        body = {
            "model": self._server.model,
            "prompt": list(prompt_ids),
            "max_tokens": limit,
            "temperature": settings.teacher_temperature,
            "top_p": settings.teacher_top_p,
            "seed": seed % 2**63,
            "stop_token_ids": list(end_ids),
            "return_token_ids": True,
        }
        answer = parsed(await self.replicas.post(COMPLETIONS, body))
        ids = answer["choices"][0].get("token_ids")
        if ids is None:
            raise ServerError(
                "the server's answer has no token_ids, so that the teacher's own texts cannot be measured; serve it "
                "with a newer vLLM, or set skd.eval.teacher=false"
            )
        return ids

    def _parse(self, answer: bytes, ids: list[int], prompt_len: int) -> Reading:
        """In a thread: an answer has K entries a token, and the loop has other requests to serve."""
        said = prompt_logprobs(parsed(answer), len(ids))
        return reading_of(said[prompt_len:], ids[prompt_len:], self._server.top_k, self._vocab_size)


def parsed(answer: bytes) -> Any:
    """Raises ServerError where it is no JSON."""
    try:
        return pydantic_core.from_json(answer)
    except ValueError as error:
        raise ServerError(f"a server's answer is no JSON: {answer[:80]!r}") from error


def prompt_logprobs(answer: Any, length: int) -> list[dict[str, dict[str, Any]]]:
    """What a server has said of each token of a text; nothing of the first.

    Raises:
        ServerError: it has said nothing, or of a text of another length.
    """
    try:
        said = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        said = None
    if said is None:
        raise ServerError(
            "the server's answer has no prompt_logprobs, so it says nothing of a text that is given; the teacher must "
            "be served by vLLM (vllm serve), without something in front of it that drops fields it does not know"
        )
    if len(said) != length:
        raise ServerError(f"the server was sent {length} tokens, and has read {len(said)}")
    return said


def reading_of(
    said: Sequence[dict[str, dict[str, Any]]], token_ids: Sequence[int], top_k: int, vocab_size: int
) -> Reading:
    """
    Args:
        said: of each token, by token id, with the rank: 1 the most probable. The text's own is among the first K, or
            one more.

    Raises:
        ServerError: fewer than K are there, or not the text's own.
    """
    ids_RK = torch.full((len(said), top_k), NOTHING, dtype=torch.int32)
    logp_RK = torch.full((len(said), top_k), -torch.inf, dtype=torch.float64)
    own_logp, own_rank = [], []
    for row, (entries, token) in enumerate(zip(said, token_ids, strict=True)):
        first: list[tuple[int, float] | None] = [None] * top_k
        for name, entry in entries.items():
            if 0 < (rank := entry.get("rank") or 0) <= top_k:
                first[rank - 1] = int(name), _logp(entry)
        own = entries.get(str(token))
        if own is None or not own.get("rank") or None in first:
            raise ServerError(
                f"the server was asked for the {top_k} most probable tokens at each place of a text and for the "
                f"text's own, and has answered with {len(entries)} others: {str(entries)[:200]}"
            )
        own_logp.append(_logp(own))
        own_rank.append(own["rank"] - 1)
        known = [entry if entry is not None and entry[0] < vocab_size else (NOTHING, -torch.inf) for entry in first]
        ids_RK[row] = torch.tensor([token_id for token_id, _ in known], dtype=torch.int32)
        logp_RK[row] = torch.tensor([logp for _, logp in known], dtype=torch.float64)
    return Reading(
        torch.tensor(own_logp, dtype=torch.float64), torch.tensor(own_rank, dtype=torch.int32), ids_RK, logp_RK
    )


def _logp(entry: dict[str, Any]) -> float:
    return entry["logprob"] if entry["logprob"] > LOWEST else -torch.inf
