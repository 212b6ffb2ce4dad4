"""vLLM's scheduler, under which the student proposes every token of a response, whatever memory and budget a step has.

vLLM reads a request's last token and takes the next one from its model, the teacher, wherever it has no drafts: at the
end of a prompt, when a request goes on after it was preempted, and where a step's budget of tokens leaves drafts out.
The first is `engine/request.py`'s; the other two are here.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from skd_plugin.engine.prefix_cache import key_by_student


class SKDScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        key_by_student()  # here, because this is made in the process of the engine, whichever that is
        self._without_last: WeakSet[Request] = WeakSet()  # preempted, and not yet back where they were

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """A preempted request forgets its last token, as its copy in the model runner will (`_update_states`). When
        it goes on, the sampler emits that token a second time behind those that are read anew, and the student
        proposes what follows.
        """
        super()._preempt_request(request, timestamp, drop_stale_output)
        if request.num_output_tokens and request not in self._without_last:
            del request._output_token_ids[-1], request._all_token_ids[-1]
            self._without_last.add(request)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        if request in self._without_last:
            self._without_last.remove(request)
            request.append_output_token_ids(new_token_ids)
            return [], False  # whoever waits for the response has it already
        if request.num_output_tokens == 0 and len(new_token_ids) == 1:
            # vLLM looks for end tokens before it looks at `min_tokens`, and a prompt may end in one (a closed turn).
            request.append_output_token_ids(new_token_ids)
            return new_token_ids, False
        return super()._update_request_with_output(request, new_token_ids, is_stale)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens of a request that a step reads; the last word on their number in `schedule`. Where the budget
        leaves room for the last token and none of the drafts, the request waits with its drafts for the next step.
        """
        number = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        no_draft = request.spec_token_ids and num_computed_tokens + number == request.num_tokens
        return 0 if no_draft else number
