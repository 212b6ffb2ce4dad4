"""The tokens that end a turn as one event (core/end_event.py), in OpenRLHF's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from skd_plugin.core.end_event import join_ends
from skd_plugin.models import joined_ends


def end_ids_of(args: Any) -> tuple[int, ...]:
    """Those of a run, by OpenRLHF's options with ours in `skd`."""
    teacher, student = args.skd.any_teacher.model_name_or_path, args.actor.model_name_or_path
    return joined_ends(teacher, student) if args.skd.joins_ends else ()


def end_tensor(end_ids: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """int64 [E]; None where nothing is joined."""
    return torch.tensor(end_ids, device=device) if end_ids else None


def join_ends_of(model: torch.nn.Module, end_ids: Sequence[int]) -> None:
    """From now on the logits that a forward of this model returns are joined, after all that it does to them."""

    def join(module: torch.nn.Module, args: Any, output: Any) -> Any:
        logits = output["logits"].float()  # as OpenRLHF makes them next
        output["logits"] = join_ends(logits, torch.tensor(end_ids, device=logits.device))
        return output

    model.register_forward_hook(join)


def end_turns(model: Any, end_ids: Sequence[int]) -> None:
    """The model ends its turn with any of these, which its generation_config.json will say where it is saved.

    Which of them it puts its probability on, the joined loss leaves to it.
    """
    model.generation_config.eos_token_id = list(end_ids)
