"""vLLM's prefix cache, where a block may hold the student's keys of another prompt than the teacher's
(engine/student_prompt.py): it is found again by what both models have in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import vllm.v1.core.kv_cache_utils as host

from skd_plugin.engine.request import EXTRA_ARGS_KEY
from skd_plugin.seams import rebind

# Of get_request_block_hasher, as it was before `key_by_student`.
vllm_keys: Any = getattr(host, "generate_block_hash_extra_keys", None)


def key_by_student() -> None:
    """In this process, vLLM's prefix cache tells blocks apart by what the student has in them, too."""
    rebind(host, "generate_block_hash_extra_keys", _keys, needed_by="a prompt of the student's own")


def _keys(request: Any, start: int, end: int, start_mm_idx: int) -> tuple[tuple[Any, ...] | None, int]:
    keys, mm_idx = vllm_keys(request, start, end, start_mm_idx)
    given = (getattr(request.sampling_params, "extra_args", None) or {}).get(EXTRA_ARGS_KEY)
    if not given or given["student_ids"] is None:
        return keys, mm_idx
    own = block_key(given["student_ids"], given["shift"], end, end - start)
    return (*(keys or ()), EXTRA_ARGS_KEY, *((request.request_id,) if own is None else own)), mm_idx


def block_key(student_ids: Sequence[int], shift: int, end: int, block: int) -> tuple[int, ...] | None:
    """What the student has in the block of this size that ends before the teacher's position `end`: nothing, tokens of
    its prompt, or None: tokens of this one response.
    """
    if end <= shift:
        return ()
    return tuple(student_ids) if end <= shift // block * block + len(student_ids) else None
