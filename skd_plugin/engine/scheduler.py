"""vLLM's scheduler, which does not take the forced end of the prompt for the end of the response."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class SKDScheduler(Scheduler):
    """vLLM looks for end tokens before it looks at `min_tokens`, and a prompt may end in one (a closed chat turn)."""

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        if request.num_output_tokens == 0 and len(new_token_ids) == 1:
            request.append_output_token_ids(new_token_ids)
            return new_token_ids, False
        return super()._update_request_with_output(request, new_token_ids, is_stale)
