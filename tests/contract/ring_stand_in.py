"""In place of ring_flash_attn, whose kernels need a GPU: causal attention of each rank's queries over gathered keys.

The same values and gradients as a ring's, without its memory. What OpenRLHF calls is here under the same names.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "ring_stand_in"  # of the attention, for transformers
_starts = torch.tensor([0])  # of the sequences among the tokens of all ranks, and the end of the last


def install() -> None:
    module: Any = types.ModuleType("ring_flash_attn")
    module.substitute_hf_flash_attn = lambda group, heads: None
    module.update_ring_flash_attn_params = _remember
    sys.modules["ring_flash_attn"] = module
    AttentionInterface.register(NAME, _attention)


def _remember(cu_seqlens: torch.Tensor, group: dist.ProcessGroup) -> None:
    global _starts
    _starts = cu_seqlens.long()


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **options: Any
) -> tuple[torch.Tensor, None]:
    """`query`: [1, heads, S, h] of this rank's tokens."""
    from openrlhf.models.ring_attn_utils import get_ring_attn_group

    group = get_ring_attn_group()
    length, copies = query.shape[2], query.shape[1] // key.shape[1]
    keys, values = (_gathered(part, group).repeat_interleave(copies, 1) for part in (key, value))
    places = torch.arange(length * group.size())
    sequence = torch.searchsorted(_starts, places, right=True)
    visible = (sequence[:, None] == sequence) & (places[:, None] >= places)
    own = visible[group.rank() * length :][:length]
    found = scaled_dot_product_attention(query, keys, values, attn_mask=own, scale=options["scaling"])
    return found.transpose(1, 2).contiguous(), None


def _gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[1, heads, R S, h] of all ranks, differentiable."""
    from flash_attn.utils.distributed import all_gather

    return all_gather(part.transpose(0, 2).contiguous(), group).transpose(0, 2)
