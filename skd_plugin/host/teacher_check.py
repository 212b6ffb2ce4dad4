"""Whether the engine's teacher is the model of its files: transformers reads the first responses of a run, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.core.end_event import join_ends
from skd_plugin.core.layout import ResponseLayout
from skd_plugin.core.trace import Drawn
from skd_plugin.engine.arguments import EngineDescription
from skd_plugin.host.trace_store import stored_trace
from skd_plugin.models import (
    attention_window,
    count_parameters,
    load_causal_model,
    load_model_config,
    mean_tolerance,
    response_logits,
)

LENGTH = 1024  # tokens that are read in all, prompts included; more where a window of attention is wider
BEYOND = 64  # tokens behind such a window
RESPONSES = 4  # at most

Read = Callable[[Experience, list[int]], list[int]]


def compare_teachers(
    samples: Sequence[Experience], engine: EngineDescription, read: Read, *, quantised: bool
) -> float:
    """Mean difference of log p of the same tokens, nats: by the engine (of its traces) and by transformers.

    The longest responses are read, on this process's CPU, before a run has updated anything. NaN where the weights do
    not fit into what memory is free: the log says so.

    Args:
        read: what the teacher has read of a sample up to the first response, of the ids that the student has read.
        quantised: the teacher's weights are rounded, by the engine or in their files; how far it is from what
            transformers makes of its files is then no fault.

    Raises:
        RuntimeError: the difference is more than rounding makes.
    """
    teacher, dtype = engine["teacher"], getattr(torch, engine["dtype"])
    config = load_model_config(teacher, "teacher")
    needed, free = count_parameters(config) * dtype.itemsize, psutil.virtual_memory().available
    if needed > free:
        print(
            f"the engine's teacher is not compared with transformers': it takes {needed / 2**30:.0f} GiB of ordinary "
            f"memory, and {free / 2**30:.0f} GiB are free here. skd check compares them on a GPU"
        )
        return float("nan")
    window = attention_window(config) or 0
    with _all_cores():
        try:
            model = load_causal_model(teacher, dtype)
        except (ImportError, ValueError, RuntimeError) as error:
            if not quantised:
                raise
            # Formats that vLLM reads, and transformers only with a package of their own, or on a GPU.
            print(f"the engine's teacher is not compared with transformers', which cannot read its rounding: {error}")
            return float("nan")
        texts = _texts(samples, read, max(LENGTH, window + BEYOND))
        gaps = [_gaps(model, engine, *text) for text in texts]
    gap = torch.cat(gaps).mean().item()
    limit = mean_tolerance(dtype)
    if not gap <= limit and not quantised:
        raise RuntimeError(
            f"the teacher in the engine is not the model of its files: log p of {sum(map(len, gaps))} sampled tokens "
            f"is {gap:.4f} nats a token away from what transformers computes, where {limit:g} is rounding. vLLM "
            f"computes this architecture in another way, or loads the weights wrongly: {teacher}. Nothing was "
            "updated. Run skd check, and report it"
        )
    return gap


def _texts(
    samples: Sequence[Experience], read: Read, length: int
) -> Iterator[tuple[list[int], list[int], ResponseLayout, Drawn]]:
    """The longest sequences, cut to `length` tokens together, as the teacher reads them up to the first response and
    from there on; where the responses are; what the engine said.
    """
    left = length
    for sample in sorted(samples, key=lambda sample: -sample.sequences.shape[1])[:RESPONSES]:
        ids = sample.sequences[0, :left].tolist()
        layout = ResponseLayout.of(sample.action_mask[:, : len(ids) - 1])
        if len(layout):
            first = int(layout.entry_N[0]) + 1
            drawn = stored_trace(sample).drawn.slice(0, len(layout))
            yield read(sample, ids[:first]), ids[first:], layout, drawn
        left -= len(ids)
        if left < 2:
            return


def _gaps(
    model: Any,
    engine: EngineDescription,
    prompt: list[int],
    rest: list[int],
    layout: ResponseLayout,
    drawn: Drawn,
) -> torch.Tensor:
    """|log p by the engine - by transformers| of the response tokens: float32 [N]."""
    first = int(layout.entry_N[0])  # the prompt's last token
    logits_RV = response_logits(model, prompt, rest)[:, : engine["vocab_size"]]
    if engine["end_ids"]:
        logits_RV = join_ends(logits_RV, torch.tensor(engine["end_ids"]))
    logp_RV = logits_RV.log_softmax(-1)
    place_N = layout.entry_N - first
    return (drawn.teacher_logp - logp_RV[place_N, torch.tensor(rest)[place_N]]).abs()


@contextmanager
def _all_cores() -> Iterator[None]:
    """Ray gives an actor one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(psutil.Process().cpu_affinity()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
