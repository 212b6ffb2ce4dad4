"""How a response is sampled: its settings; temperature, nucleus and inverse-CDF sampling, each row with its own.

Nothing here waits for a value of a tensor on a GPU, and no long row is sorted.

Shapes: N rows, V vocabulary entries, E entries of a part of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch

from skd_plugin.core.copies import to_device
from skd_plugin.core.top_k import top_k

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
    """Settings as tensors, one entry a row: `rows.top_k` is int64 [N], `rows.threshold` float32 [N], and so on.

    A column is made when it is asked for, from the different settings that there are: mostly all rows have the same.
    """

    def __init__(self, kinds: _Kinds, kind_N: torch.Tensor) -> None:
        """Args: kind_N: int64, which of the kinds each row has."""
        self._kinds, self._kind_N = kinds, kind_N
        self._read: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, settings: Sequence[SamplingSettings], device: torch.device | str) -> SettingRows:
        place = {own: kind for kind, own in enumerate(dict.fromkeys(settings))}
        on = torch.device(device)
        return cls(_Kinds([*place], on), to_device(torch.tensor([place[own] for own in settings]), on))

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in _COLUMNS:
            raise AttributeError(f"'{name}' is no setting that rows have; they have {', '.join(_COLUMNS)}")
        if name not in self._read:
            self._read[name] = self._kinds.column(name)[self._kind_N]
        return self._read[name]

    def select(self, rows: torch.Tensor | slice) -> SettingRows:
        """Args: rows: int64, the same one as often as one likes; or a slice."""
        return SettingRows(self._kinds, self._kind_N[rows])

    def values(self, name: str) -> frozenset[Any]:
        """What this setting may be in a row, and in no row anything else. Known without asking the device."""
        return self._kinds.values(name)


class _Kinds:
    """The different settings of the rows of a batch."""

    def __init__(self, kinds: Sequence[SamplingSettings], device: torch.device) -> None:
        self._settings, self._device = kinds, device
        self._columns: dict[str, torch.Tensor] = {}
        self._values: dict[str, frozenset[Any]] = {}

    def column(self, name: str) -> torch.Tensor:
        """Of a setting, an entry a kind."""
        if name not in self._columns:
            values = [getattr(own, name) for own in self._settings]
            self._columns[name] = to_device(torch.tensor(values, dtype=_COLUMNS[name]), self._device)
        return self._columns[name]

    def values(self, name: str) -> frozenset[Any]:
        if name not in self._values:
            self._values[name] = frozenset(getattr(own, name) for own in self._settings)
        return self._values[name]


Model = Literal["student", "teacher"]


def warp_of(logits_NV: torch.Tensor, settings: SettingRows, model: Model) -> torch.Tensor:
    """`warp` with the settings of one of the models, without the passes that none of the rows needs."""
    temperature, top_p = f"{model}_temperature", f"{model}_top_p"
    temperatures = settings.values(temperature)
    return warp(
        logits_NV,
        None if temperatures == {1.0} else getattr(settings, temperature),
        None if settings.values(top_p) == {1.0} else getattr(settings, top_p),
        greedy=0.0 in temperatures,
    )


def warp(
    logits_NV: torch.Tensor, temperature_N: torch.Tensor | None, top_p_N: torch.Tensor | None, *, greedy: bool = True
) -> torch.Tensor:
    """Probabilities after temperature and nucleus (top-p) truncation.

    A temperature of 0 puts all mass on the largest logit (the lowest id among equals). The nucleus is the smallest
    set of most probable tokens whose mass reaches top_p (Holtzman et al. 2020); the token that crosses it is kept, and
    of equally probable ones the lower id first.

    Args:
        logits_NV: [N, V], any float type.
        temperature_N: float [N], >= 0; None is 1 in every row.
        top_p_N: float [N], in (0, 1]; None is 1 in every row.
        greedy: whether a temperature may be 0.

    Returns:
        float32 [N, V]; rows sum to 1.
    """
    logits_NV = logits_NV.float()
    if temperature_N is None:
        probs_NV = logits_NV.softmax(-1)
    else:
        probs_NV = (logits_NV / torch.where(temperature_N <= 0, 1.0, temperature_N)[:, None]).softmax(-1)
    if top_p_N is not None:
        probs_NV = _nucleus(probs_NV, top_p_N)
    if temperature_N is not None and greedy:
        one_hot = torch.zeros_like(probs_NV).scatter_(1, logits_NV.argmax(-1, keepdim=True), 1.0)
        probs_NV = torch.where((temperature_N <= 0)[:, None], one_hot, probs_NV)
    return probs_NV


SEARCHED = 4096  # entries of a row, below which searching all of it for its nucleus is as fast
HIGHEST = 128  # of a longer one, among which its nucleus mostly is


def _nucleus(probs_NV: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """The nucleus of each row. On a CPU it is looked for among a long row's highest entries first; a GPU would have to
    be waited for, to say of which rows it is not there.
    """
    if probs_NV.device.type != "cpu" or probs_NV.shape[1] < SEARCHED:
        return _searched_nucleus(probs_NV, top_p_N)
    nucleus_NV, found_N = _nucleus_of_highest(probs_NV, top_p_N)
    if not bool(found_N.all()):
        nucleus_NV[~found_N] = _searched_nucleus(probs_NV[~found_N], top_p_N[~found_N])
    return nucleus_NV


def _nucleus_of_highest(probs_NV: torch.Tensor, top_p_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nucleus of each row whose highest entries have all of it, and which rows these are, bool [N]."""
    top_p_N1 = top_p_N[:, None]
    by_id_NM = top_k(probs_NV, HIGHEST)[1].sort(-1).values
    high_NM, order_NM = probs_NV.gather(1, by_id_NM).sort(dim=-1, descending=True, stable=True)
    sum_NM = high_NM.cumsum(-1, dtype=torch.float64)
    kept_NM = high_NM * (sum_NM - high_NM < top_p_N1)
    # Entries that are as probable as the lowest of these may be elsewhere, too, with lower ids.
    ends_here_N = ~((kept_NM > 0) & (high_NM == high_NM[:, -1:])).any(-1)
    found_N = (sum_NM[:, -1] >= top_p_N) & ends_here_N & (top_p_N < 1)
    kept_NM /= kept_NM.sum(-1, keepdim=True)
    return torch.zeros_like(probs_NV).scatter_(1, by_id_NM.gather(1, order_NM), kept_NM), found_N


def _searched_nucleus(probs_NV: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """Without a sort.

    The probability of the token that crosses is found bit by bit, from the highest on: the largest float32 number
    such that what is at least as probable reaches top_p. Floats that are not negative are in the order of their bits.
    """
    top_p_N1, at_least_NV = top_p_N[:, None], torch.empty_like(probs_NV)
    crosses_N1 = torch.zeros_like(top_p_N1, dtype=torch.int32)
    for bit in reversed(range(30)):  # 1.0 has its highest one at 29
        higher_N1 = crosses_N1 | 1 << bit
        torch.ge(probs_NV, higher_N1.view(torch.float32), out=at_least_NV)
        reaches_N1 = at_least_NV.mul_(probs_NV).sum(-1, keepdim=True) >= top_p_N1
        crosses_N1 = torch.where(reaches_N1, higher_N1, crosses_N1)
    least_N1 = crosses_N1.view(torch.float32)
    above_NV, ties_NV = probs_NV * (probs_NV > least_N1), probs_NV * (probs_NV == least_N1)
    before_NV = ties_NV.cumsum(-1).sub_(ties_NV).add_(above_NV.sum(-1, keepdim=True))
    kept_NV = above_NV.add_(ties_NV.mul_(before_NV < top_p_N1))
    kept_NV = torch.where(top_p_N1 < 1, kept_NV, probs_NV)
    return kept_NV / kept_NV.sum(-1, keepdim=True)


_BLOCK = 256  # entries of a long row that a draw adds up first


def draw(probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """One token a row by inversion of the cumulative distribution; never a token of probability zero.

    A long row is cut into blocks: the number falls into one of them, and then to an entry of it. So what is added up
    one by one, in float64, is two short rows and not the long one.

    Args:
        probs_NV: float [N, V], non-negative; rows need not be normalised. Of a row that is no distribution (NaN, or no
            mass at all) comes some token.
        uniform_N: float64 [N], in (0, 1].

    Returns:
        int64 [N].
    """
    vocab_size = probs_NV.shape[1]
    if vocab_size <= 4 * _BLOCK:
        sum_NV = probs_NV.cumsum(-1, dtype=torch.float64)
        return _reach(sum_NV, uniform_N[:, None] * sum_NV[:, -1:]).squeeze(1)
    whole = vocab_size // _BLOCK * _BLOCK
    blocks = [probs_NV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1), probs_NV[:, whole:].sum(-1, keepdim=True)]
    sum_NE = torch.cat(blocks, dim=1).cumsum(-1, dtype=torch.float64)
    target_N1 = uniform_N[:, None] * sum_NE[:, -1:]
    block_N1 = _reach(sum_NE, target_N1)
    before_N1 = torch.where(block_N1 > 0, sum_NE.gather(1, (block_N1 - 1).clamp_min(0)), 0.0)
    share_N1 = ((target_N1 - before_N1) / (sum_NE.gather(1, block_N1) - before_N1)).clamp_max(1.0)
    ids_NE = block_N1 * _BLOCK + torch.arange(_BLOCK, device=probs_NV.device)
    own_NE = torch.where(ids_NE < vocab_size, probs_NV.gather(1, ids_NE.clamp_max(vocab_size - 1)), 0.0)
    sum_NE = own_NE.cumsum(-1, dtype=torch.float64)
    token_N1 = block_N1 * _BLOCK + _reach(sum_NE, share_N1 * sum_NE[:, -1:])
    return token_N1.squeeze(1).clamp_max(vocab_size - 1)


def _reach(sum_NE: torch.Tensor, target_N1: torch.Tensor) -> torch.Tensor:
    """The first entry that reaches the target: it has risen above its neighbour, so its probability is not zero."""
    return torch.searchsorted(sum_NE, target_N1, right=False).clamp_max_(sum_NE.shape[1] - 1)
