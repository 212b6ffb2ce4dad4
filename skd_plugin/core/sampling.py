"""How a response is sampled: its settings; temperature, nucleus and inverse-CDF sampling, each row with its own.

Shapes: N rows, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_type_hints

import torch

KEEP_ALL = 2**31 - 1  # a K that no vocabulary reaches: every proposal is kept; a limit that nothing reaches


@dataclass(frozen=True)
class SamplingSettings:
    """How one response is sampled."""

    top_k: int  # K of the gate; >= vocabulary keeps every proposal, 0 none
    gate: str = "top_k"  # a name of core.gates.GATES
    threshold: float = 0.0  # of the gates that have one
    top_k_decay_len: int = 0  # response tokens over which K falls to 1; 0: K stays
    write_back: bool = True  # False: a rejected proposal stays in the text and is only flagged
    hand_over_len: int = 0  # tokens that the teacher writes from a rejection on (core/hand_over.py); 0: no legs
    hand_overs: int = KEEP_ALL  # legs of a response, at most
    hand_over_until: float = -1.0  # nats; a leg ends where the teacher's entropy is this or less. Below 0: never
    student_temperature: float = 1.0  # of the proposals
    student_top_p: float = 1.0
    teacher_temperature: float = 1.0  # of the tokens in place of rejected ones
    teacher_top_p: float = 1.0


_DTYPES = {int: torch.int64, float: torch.float32, bool: torch.bool}
# The settings that are a tensor in `SettingRows`; the gate, a name, is not.
_COLUMNS = {name: _DTYPES[kind] for name, kind in get_type_hints(SamplingSettings).items() if kind in _DTYPES}


class SettingRows:
    """Settings as tensors, one entry a row: `rows.top_k` is int64 [N], `rows.threshold` float32 [N], and so on."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self._columns = columns

    @classmethod
    def of(cls, settings: Sequence[SamplingSettings], device: torch.device | str) -> SettingRows:
        return cls(
            {
                name: torch.tensor([getattr(own, name) for own in settings], dtype=dtype, device=device)
                for name, dtype in _COLUMNS.items()
            }
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in _COLUMNS:
            raise AttributeError(f"'{name}' is no setting that rows have; they have {', '.join(_COLUMNS)}")
        return self._columns[name]

    def select(self, rows: torch.Tensor | list[int]) -> SettingRows:
        """Args: rows: indices, or a mask."""
        return self._each(lambda column: column[rows])

    def repeat(self, counts_N: torch.Tensor) -> SettingRows:
        """Each row as often as its entry of `counts_N` says."""
        return self._each(lambda column: column.repeat_interleave(counts_N))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SettingRows:
        return SettingRows({name: change(column) for name, column in self._columns.items()})


def warp(logits_NV: torch.Tensor, temperature_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """Probabilities after temperature and nucleus (top-p) truncation.

    A temperature of 0 puts all mass on the largest logit (the lowest id among equals). The nucleus is the smallest
    set of most probable tokens whose mass reaches top_p (Holtzman et al. 2020); the token that crosses it is kept.

    Args:
        logits_NV: [N, V], any float type.
        temperature_N: float [N], >= 0.
        top_p_N: float [N], in (0, 1].

    Returns:
        float32 [N, V]; rows sum to 1.
    """
    logits_NV = logits_NV.float()
    greedy_N = temperature_N <= 0
    probs_NV = (logits_NV / torch.where(greedy_N, 1.0, temperature_N)[:, None]).softmax(-1)
    if bool((top_p_N < 1).any()):
        probs_NV = _nucleus(probs_NV, top_p_N)
    if bool(greedy_N.any()):
        one_hot = torch.zeros_like(probs_NV).scatter_(1, logits_NV.argmax(-1, keepdim=True), 1.0)
        probs_NV = torch.where(greedy_N[:, None], one_hot, probs_NV)
    return probs_NV


def _nucleus(probs_NV: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    mass_before_NV = sorted_NV.cumsum(-1, dtype=torch.float64) - sorted_NV
    keep_NV = (mass_before_NV < top_p_N[:, None]) | (top_p_N >= 1)[:, None]
    kept_NV = torch.zeros_like(probs_NV).scatter_(1, order_NV, sorted_NV * keep_NV)
    return kept_NV / kept_NV.sum(-1, keepdim=True)


def draw(probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """One token a row by inversion of the cumulative distribution; never a token of probability zero.

    Args:
        probs_NV: float [N, V], non-negative; rows need not be normalised.
        uniform_N: float64 [N], in (0, 1].

    Returns:
        int64 [N].
    """
    cdf_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    target_N1 = uniform_N[:, None] * cdf_NV[:, -1:]
    # The first entry that reaches the target: it has risen above its neighbour, so its probability is not zero.
    return torch.searchsorted(cdf_NV, target_N1, right=False).squeeze(1)
