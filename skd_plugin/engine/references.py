"""Given texts in place of sampled ones: they go through the engine as drafts that are all kept.

So both models say what they think of every token of a reference, as of any other, and supervised distillation needs
no second engine and no second path of data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch

from skd_plugin.core.copies import to_device
from skd_plugin.core.rng import COIN, derive_seed, uniform
from skd_plugin.core.trace import NOTHING
from skd_plugin.models import end_tokens


class MissingReference(ValueError):
    """A prompt is to be answered by its reference and has none."""


def is_chosen(share: float, seed: int, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt is answered by its reference: true for `share` of the prompts.

    A pure function of its arguments; `seed` is that of the run and the step.
    """
    if not 0 < share < 1:
        return share > 0
    drawn = uniform(torch.tensor([derive_seed(seed, crc32(str(list(prompt_ids)).encode()))]), torch.zeros(1), COIN)
    return bool(drawn <= share)


def reference_ids(
    reference: str | None, tokenizer: Any, prompt_ids: Sequence[int], end_ids: Sequence[int] = ()
) -> list[int]:
    """Tokens of a reference, with the end token after it and no other special token added.

    Args:
        end_ids: of `joined_ends`; one that the text names, as the teacher's own, is the one that stands for all.

    Raises:
        MissingReference: names the prompt.
    """
    if not reference:
        raise MissingReference(
            "skd.rollout.method needs a reference for every prompt, and this one has none: "
            f"{tokenizer.decode(list(prompt_ids))[:80]!r}. Name the dataset's column of references "
            '(openrlhf.data.label_key); a line of `skd rollout --prompts` has it as "reference"'
        )
    ids = [*tokenizer(reference, add_special_tokens=False).input_ids, *end_tokens(tokenizer)]
    return [end_ids[0] if token in end_ids else token for token in ids]


def padded(forced: Sequence[Sequence[int] | None], device: torch.device) -> torch.Tensor:
    """References of a batch, int64 [B, F]; `NOTHING` after their ends, and all over a row without one."""
    width = max(1, *(len(ids or ()) for ids in forced))
    rows = [[*(ids or ()), *[NOTHING] * (width - len(ids or ()))] for ids in forced]
    return to_device(torch.tensor(rows, dtype=torch.int64), device)


def follow(forced_BF: torch.Tensor, age_B: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """The reference's token at the response position `age`, or `token` where there is none: int64 [B]."""
    inside_B = (age_B >= 0) & (age_B < forced_BF.shape[1])
    wanted_B = forced_BF.gather(1, age_B.clamp(0, forced_BF.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(inside_B & (wanted_B != NOTHING), wanted_B, token_B)
