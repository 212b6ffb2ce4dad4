"""vLLM's scheduler, under which the student proposes every token of a response, whatever memory and budget a step has.

vLLM reads a request's last token and takes the next one from its model, the teacher, wherever it has no drafts: at the
end of a prompt, when a request goes on after it was preempted, and where a step's budget of tokens leaves drafts out.
The first is `engine/request.py`'s; the other two are here.
"""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakSet

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from skd_plugin.core.draft_length import DraftLength
from skd_plugin.engine.prefix_cache import key_by_student
from skd_plugin.engine.set_up import end_with_its_threads


class SKDScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        key_by_student()  # here, because this is made in the process of the engine, whichever that is
        end_with_its_threads()
        self._without_last: WeakSet[Request] = WeakSet()  # preempted, and not yet back where they were
        self._seconds = 0.0  # spent here, and not yet told to the worker
        options = self.vllm_config.additional_config
        self._lengths = DraftLength(self.num_spec_tokens) if options.get("skd_draft_len_auto") else None
        self._begun = 0.0  # when the latest plan was begun

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's plan of a step, on which the worker also reads how long planning takes (`seconds_of`)."""
        self._begun = time.perf_counter()
        output: Any = super().schedule(*args, **kwargs)
        if self._lengths is not None and output.num_scheduled_tokens:
            output.num_spec_tokens_to_schedule = self._lengths.choose(len(output.num_scheduled_tokens))
        output.skd_seconds = self._seconds + time.perf_counter() - self._begun
        self._seconds = 0.0
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        outputs = super().update_from_output(*args, **kwargs)
        ended = time.perf_counter()
        self._seconds += ended - started
        if self._lengths is not None:
            self._measure(self._lengths, ended - self._begun, *args, **kwargs)
        return outputs

    @staticmethod
    def _measure(lengths: DraftLength, seconds: float, scheduler_output: Any, model_runner_output: Any) -> None:
        """What a step has cost and brought; vLLM has cut the tokens at the ends of the responses, in their lists."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        # vLLM pads a request that has one token to read with placeholders of -1.
        counts = {request_id: len(own) for request_id, own in drafts.items() if own and own[0] >= 0}
        emitted = zip(model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=False)
        lengths.observe_blocks(
            [(counts[request_id], len(tokens)) for request_id, tokens in emitted if request_id in counts]
        )
        requests, drafted = len(scheduler_output.num_scheduled_tokens), scheduler_output.num_spec_tokens_to_schedule
        if len(counts) == requests and set(counts.values()) == {drafted}:
            lengths.observe_step(requests, drafted, seconds)

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


def seconds_of(plan: Any) -> float:
    """That the scheduler has spent since its last plan. Others make plans, too: vLLM's, of a step without tokens."""
    return getattr(plan, "skd_seconds", 0.0)
