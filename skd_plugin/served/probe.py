"""Whether the servers of a teacher are what a recipe asks for, found before anything heavy starts."""

from __future__ import annotations

from typing import Any

import httpx

from skd_plugin.core.trace import NOTHING
from skd_plugin.errors import RecipeError
from skd_plugin.served.replicas import ServerError, refusal
from skd_plugin.served.teacher import COMPLETIONS, Server, prompt_logprobs, reading_of
from skd_plugin.words import first_line

WAIT_S = 60.0  # for an answer; a server that is still loading refuses the connection
SPREAD = 48  # tokens of the vocabulary that are in the text, evenly spread
TEXT = "One text, 12345 digits, naïve accents, 你好, Ελλάδα, 🙂 and\n\tsome\u00a0space: "
SLACK = 1e-3  # of a sum of probabilities


def probe(server: Server, tokenizer: Any, vocab_size: int, longest: int) -> list[str]:
    """What each of the servers says of itself, in words.

    Args:
        tokenizer: the teacher's, by its files.
        vocab_size: ids that both models have.
        longest: tokens of the longest text that will be read.

    Raises:
        RecipeError: what is wrong with one of them.
    """
    text, ids = probe_text(tokenizer, vocab_size, longest)
    with httpx.Client(headers=server.headers(), timeout=WAIT_S) as client:
        return [_Probe(client, url, server).run(text, ids, longest) for url in server.urls]


def probe_text(tokenizer: Any, vocab_size: int, longest: int) -> tuple[str, list[int]]:
    """A text of many kinds of tokens, and what the tokenizer makes of it."""
    spread = (tokenizer.decode([token_id]) for token_id in range(0, vocab_size, -(-vocab_size // SPREAD)))
    text = TEXT + " ".join(spread)
    while len(ids := tokenizer(text, add_special_tokens=False).input_ids) > longest:
        text = text[: len(text) // 2]
    return text, ids


class _Probe:
    """Of one server."""

    def __init__(self, client: httpx.Client, url: str, server: Server) -> None:
        self._client, self._url, self._server = client, url, server

    def run(self, text: str, ids: list[int], longest: int) -> str:
        room = self._room()
        if room is not None and room <= longest:
            raise RecipeError(
                f"the server at {self._url} takes {room} tokens, but the longest text has {longest}, and one is "
                f"written behind it: start it with --max-model-len {longest + 1} or more"
            )
        question = self._server.question(text, add_special_tokens=False, return_token_ids=True)
        answer = self._answer("POST", COMPLETIONS, question)
        self._check_tokens(answer, ids)
        self._check_reading(answer, ids)
        return f"{self._server.model} at {self._url}" + ("" if room is None else f", texts of up to {room} tokens")

    def _room(self) -> int | None:
        """Tokens of the longest sequence that it takes, where it says so."""
        listed = {model["id"]: model.get("max_model_len") for model in self._answer("GET", "/v1/models")["data"]}
        if self._server.model not in listed:
            raise RecipeError(
                f"the server at {self._url} has no model '{self._server.model}'; it has "
                f"{', '.join(map(repr, listed))}: set skd.teacher.server.model, or start it with --served-model-name"
            )
        return listed[self._server.model]

    def _check_tokens(self, answer: Any, ids: list[int]) -> None:
        """Of a text that both have made tokens of."""
        theirs = answer["choices"][0].get("prompt_token_ids")
        if theirs is not None and theirs != ids:
            place = next((n for n, pair in enumerate(zip(theirs, ids, strict=False)) if pair[0] != pair[1]), len(ids))
            raise RecipeError(
                f"the tokens of the server at {self._url} are not those of skd.teacher.model_name_or_path: of the "
                f"same text it makes {len(theirs)} tokens and ours {len(ids)}, and from token {place} on they differ: "
                f"{theirs[place : place + 5]} and {ids[place : place + 5]}. An id must mean the same in both models; "
                "serve the model that is named there, or name the one that is served"
            )

    def _check_reading(self, answer: Any, ids: list[int]) -> None:
        try:
            reading = reading_of(prompt_logprobs(answer, len(ids))[1:], ids[1:], self._server.top_k, vocab_size=2**31)
        except ServerError as error:
            raise RecipeError(f"{self._url}: {error}") from error
        most = reading.topk_logp_RK.masked_fill(reading.topk_ids_RK == NOTHING, 0.0).exp().sum(1).max().item()
        if most > 1 + SLACK:
            raise RecipeError(
                f"the server at {self._url} says that the {self._server.top_k} most probable tokens of one place have "
                f"a probability of {most:.3f} together, so these are no log-probabilities: start it without "
                "--logprobs-mode, or with raw_logprobs"
            )

    def _answer(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._client.request(verb, self._url + path, json=body)
        except httpx.TransportError as error:
            raise RecipeError(
                f"no server answers at {self._url} (skd.teacher.url): {type(error).__name__}: {first_line(error)}. "
                f"Start it, and wait until it is ready: {self._server.command}"
            ) from error
        if answer.status_code in (401, 403):
            key = self._server.key_env or "none (skd.teacher.server.key_env)"
            raise RecipeError(f"{refusal(self._url, answer)}. It wants a key; the one that it was sent is of {key}")
        if answer.status_code == 400 and "logprobs" in answer.text:
            raise RecipeError(
                f"{refusal(self._url, answer)}. It was asked for the {self._server.top_k} most probable tokens "
                f"(skd.loss.teacher_top_k): start it with --max-logprobs {self._server.top_k}, or ask for fewer"
            )
        if answer.status_code != httpx.codes.OK:
            raise RecipeError(f"{refusal(self._url, answer)}. Is it a server of vLLM? {self._server.command}")
        return _json(answer, self._url)


def _json(answer: httpx.Response, url: str) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise RecipeError(f"{url} answers with something else than JSON: {answer.text[:80]!r}") from error
