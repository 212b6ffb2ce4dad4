"""A prepared request for tests, by what it differs in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from skd_plugin.engine.request import Request, prepare_request
from tests.rules import make_rule


class Letters:
    """A tokenizer whose ids are code points. 2 ends a text; ids below 3 are special."""

    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(char) for char in text])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in ids if token >= 3 or not skip_special_tokens)


def make_request(prompt_ids: list[int], rule: Any = None, sampling_params: Any = None, **others: Any) -> Request:
    from vllm import SamplingParams

    fields = {"trace_id": 0, "seed": 0, "choice_seed": 0, "max_new_tokens": 8, "reference": None} | others
    return prepare_request(
        prompt_ids, rule or make_rule(top_k=3), sampling_params or SamplingParams(), Letters(), **fields
    )
