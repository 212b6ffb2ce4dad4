"""Stop strings count inside the response alone, and end its ids and its text at the same token.

vLLM looks for them in a text that begins with the forced last token of the prompt, and cuts the text but not the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from skd_plugin.engine.request import EXTRA_ARGS_KEY, first_stop


class ResponseDetokenizer(IncrementalDetokenizer):
    """Stands where vLLM's output processor makes a request's detokenizer. It makes no text, which `finish_request`
    does in the end; it only says when a stop string is there.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        super().__init__()
        self._stops, self._decode = stops, decode

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: Any) -> IncrementalDetokenizer:
        params = request.sampling_params
        if tokenizer is None or EXTRA_ARGS_KEY not in (params.extra_args or {}):
            return IncrementalDetokenizer.from_new_request(tokenizer, request)

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)

        return cls(params.stop, decode)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Takes the tokens of a step; the stop string that the response has with one of them, if there is one."""
        for token in new_token_ids:
            self.token_ids.append(token)
            found = first_stop(self._decode(self.token_ids[1:]), self._stops)  # the first is the prompt's last
            if found is not None:
                return found.string
        return None
