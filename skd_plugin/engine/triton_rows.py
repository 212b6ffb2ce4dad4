"""The passes over rows of logits as kernels (engine/triton_kernels.py), for a GPU. What they find is `LogitRows`' to
rounding.

`rank` reads the teacher's rows once. `look` reads the teacher's and the student's once: a row is cut into pieces (as
in core/top_k.py), and of each piece come its highest entry and its mass, of the row what log-sum-exp, KL and entropies
need. `sample` does so for its own rows, and reads the piece that it draws from once more; `warp` reads its rows twice;
a nucleus takes a few passes more. Everything else is short rows, in torch. Where torch makes a pass, or two, for each
operator, nothing of the size of the logits is written, but for the probabilities of `warp`.

Shapes: N rows, V entries, P pieces of L entries, K and C entries at the top of the teacher and of the student,
X pieces that are looked into, E tokens that end a turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton

from skd_plugin.core.logit_rows import LogitRows, Seen, Wanted, in_parts
from skd_plugin.core.sampling import Model, SettingRows
from skd_plugin.core.top_k import piece_len
from skd_plugin.engine.triton_kernels import (
    ENTRIES,
    LOWEST,
    WARPS,
    draw_kernel,
    look_kernel,
    nucleus_kernel,
    pieces_kernel,
    rank_kernel,
    warp_kernel,
)

_WEIGHED = ENTRIES.value // 2  # entries of a row that a program of `_weigh` reads at once


class TritonRows(LogitRows):
    def rank(self, token_N: torch.Tensor) -> torch.Tensor:
        rank_N = torch.empty(len(token_N), dtype=torch.int32, device=token_N.device)
        if len(token_N):
            own_N = self.at(token_N[:, None]).squeeze(1)
            rank_kernel[(len(token_N),)](
                *self._arguments(), token_N, own_N, rank_N, self.vocab_size, ENDS=self._ends, num_warps=WARPS
            )
        return rank_N.long()

    def look(self, student: LogitRows, token_N: torch.Tensor, wanted: Wanted) -> Seen:
        assert isinstance(student, TritonRows)
        pieces = max(wanted.teacher_top + wanted.student_kept + 1, wanted.student_top)  # looked into, of a row
        width = pieces * self._piece_len(wanted)
        parts = in_parts(len(token_N), self.values_SV, width)
        seen = [self.select(part)._look(student.select(part), token_N[part], wanted) for part in parts]
        return Seen(*map(torch.cat, zip(*seen, strict=True)))

    def sample(self, settings: SettingRows, model: Model, uniform_N: torch.Tensor) -> torch.Tensor:
        token_N = torch.empty(len(uniform_N), dtype=torch.int64, device=uniform_N.device)
        seen, sizes, constants = self._weigh(settings, model)
        draw_kernel[(len(uniform_N),)](*seen, uniform_N, token_N, *sizes, **constants)
        return token_N

    def warp(self, settings: SettingRows, model: Model) -> torch.Tensor:
        probs_NV = torch.empty(len(self.rows_N), self.vocab_size, device=self.values_SV.device)
        seen, sizes, constants = self._weigh(settings, model)
        at_once = _WEIGHED // constants["LENGTH"]
        warp_kernel[(len(probs_NV),)](*seen, probs_NV, *sizes, PIECES=at_once, **constants)
        return probs_NV

    def _weigh(
        self, settings: SettingRows, model: Model
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, int], dict[str, int]]:
        """What a kernel that draws or normalises is given: tensors, V and P, constants."""
        count, size, device = len(self.rows_N), self.vocab_size, self.values_SV.device
        length = min(piece_len(size, 1), _WEIGHED)
        pieces, at_once = triton.cdiv(size, length), _WEIGHED // length
        cut = {"ENDS": self._ends, "LENGTH": length, "num_warps": WARPS}
        whole = {"ALL": triton.next_power_of_2(pieces), "BITS": self._bits}
        row = *self._arguments(), getattr(settings, f"{model}_temperature")
        highest_NP, mass_NP = (torch.empty(count, pieces, device=device) for _ in range(2))
        pieces_kernel[(count, triton.cdiv(pieces, at_once))](
            *row, highest_NP, mass_NP, size, pieces, PIECES=at_once, **cut
        )
        truncated = settings.values(f"{model}_top_p") != {1.0}
        kept: tuple[torch.Tensor, ...] = (mass_NP,) * 5  # of the last four nothing is read
        if truncated:
            above_NP, ties_NP = torch.empty_like(mass_NP), torch.empty_like(mass_NP, dtype=torch.int32)
            edge_N, keep_N = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
            kept = above_NP, ties_NP, edge_N, keep_N, torch.empty(count, device=device)
            top_p_N = getattr(settings, f"{model}_top_p")
            nucleus_kernel[(count,)](
                *row, top_p_N, highest_NP, mass_NP, *kept, size, pieces, PIECES=at_once, **cut, **whole
            )
        return (*row, highest_NP, *kept), (size, pieces), {**cut, **whole, "NUCLEUS": truncated}

    @property
    def _bits(self) -> int:
        """In which the logits differ from each other, of the upper ones of a number of float32; a multiple of 4."""
        if self._ends:  # joined ones have all digits
            return 32
        return {torch.bfloat16: 16, torch.float16: 20}.get(self.values_SV.dtype, 32)

    def _piece_len(self, wanted: Wanted) -> int:
        return min(piece_len(self.vocab_size, max(wanted.teacher_top, wanted.student_top)), ENTRIES.value)

    def _look(self, student: TritonRows, token_N: torch.Tensor, wanted: Wanted) -> Seen:
        count, size, token_N1 = len(token_N), self.vocab_size, token_N[:, None]
        teacher_top, student_top = min(wanted.teacher_top, size), min(wanted.student_top, size)
        length = self._piece_len(wanted)
        pieces = triton.cdiv(size, length)
        figures_7N = torch.empty(7, count, device=token_N.device)
        # Each by itself: Triton would compile anew for memory that begins at an odd place.
        teacher_NP, student_NP, mass_NP = (torch.empty(count, pieces, device=token_N.device) for _ in range(3))
        teacher_own_N1, student_own_N1 = self.at(token_N1), student.at(token_N1)
        # As far apart are the logits elsewhere, too, where the models agree; so little of the divergence cancels.
        shift_N1 = teacher_own_N1 - student_own_N1
        shift_N1 = torch.where(shift_N1.abs() < -LOWEST.value, shift_N1, 0.0)
        look_kernel[(count,)](
            *self._arguments(),
            *student._arguments(),
            shift_N1,
            figures_7N,
            teacher_NP,
            student_NP,
            mass_NP,
            size,
            pieces,
            count,
            1 / wanted.temperature,
            ENDS=self._ends,
            STUDENT_ENDS=student._ends,
            LENGTH=length,
            PIECES=ENTRIES.value // length,
            TEMPERED=wanted.temperature != 1,
            num_warps=WARPS,
        )
        highest, mass, centred, apart, own_highest, own_mass, own_centred = figures_7N[:, :, None]
        teacher = _Normal(highest, mass.log())
        student_normal = _Normal(own_highest, own_mass.log())
        top_NK, ids_NK, piece_NX = self._top(teacher_NP, teacher_top, length)
        _, own_NC, _ = student._top(student_NP, student_top, length)
        named_NX = torch.cat([ids_NK[:, : wanted.teacher_kept], own_NC[:, : wanted.student_kept], token_N1], 1)

        def tempered(values: torch.Tensor) -> torch.Tensor:
            return (teacher(values) / wanted.temperature).exp()

        return Seen(
            student_logp_N1=student_normal(student_own_N1),
            teacher_logp_N1=teacher(teacher_own_N1),
            kl_N1=apart / mass + (shift_N1 - (highest - own_highest)) + (student_normal.log_mass - teacher.log_mass),
            student_entropy_N1=student_normal.log_mass - own_centred / own_mass,
            teacher_entropy_N1=teacher.log_mass - centred / mass,
            rest_N1=self._rest(tempered(teacher_NP) * mass_NP, piece_NX, named_NX, length, tempered).log(),
            teacher_top_NK=teacher(top_NK),
            teacher_ids_NK=ids_NK,
            teacher_own_NC=teacher(self.at(own_NC)),
            student_ids_NC=own_NC,
        )

    @property
    def vocab_size(self) -> int:
        return self.values_SV.shape[1]

    def at(self, ids_NX: torch.Tensor) -> torch.Tensor:
        """float32 [N, X], the logits of some ids in each row, as `read` would have them."""
        values_NX = self.values_SV[self.rows_N[:, None], ids_NX].float()
        if self.ends_E is None:
            return values_NX
        for place, end in enumerate(self.ends_E):
            values_NX = torch.where(ids_NX == end, LOWEST.value if place else self._joined_N1, values_NX)
        return values_NX

    @cached_property
    def _joined_N1(self) -> torch.Tensor:
        """What the first of the end tokens has, [N, 1]."""
        return self.values_SV[self.rows_N[:, None], self.ends_E].float().logsumexp(-1, keepdim=True)

    @property
    def _ends(self) -> int:
        return 0 if self.ends_E is None else len(self.ends_E)

    def _arguments(self) -> tuple[Any, ...]:
        """Of a kernel that reads these rows; where no ends are joined it reads neither of the last two."""
        unused = self.rows_N, self.values_SV
        ends = unused if self.ends_E is None else (self.ends_E, self._joined_N1)
        return self.values_SV, self.values_SV.stride(0), self.rows_N, *ends

    def _top(
        self, highest_NP: torch.Tensor, count: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits and ids at the top of each row, and the pieces in which they are."""
        piece_NX = highest_NP.topk(min(count, highest_NP.shape[1]), dim=-1).indices
        top_NK, place_NK = self._entries(piece_NX, length).topk(count, dim=-1)
        return top_NK, ids_of(piece_NX, length).gather(1, place_NK), piece_NX

    def _entries(self, piece_NX: torch.Tensor, length: int) -> torch.Tensor:
        """The logits of some pieces, [N, X L]; -inf behind the end of the vocabulary."""
        ids_NX = ids_of(piece_NX, length)
        return self.at(ids_NX.clamp_max(self.vocab_size - 1)).masked_fill_(ids_NX >= self.vocab_size, -torch.inf)

    def _rest(
        self,
        mass_NP: torch.Tensor,
        piece_NX: torch.Tensor,
        named_NX: torch.Tensor,
        length: int,
        weight: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The mass of all entries that are not named, [N, 1]: of pieces without a named one as a whole, of the others
        entry by entry.

        Args:
            mass_NP: of each piece.
            piece_NX: some pieces; those of the named may be among them.
            named_NX: ids, each once or several times.
            weight: an entry's mass, of its logit.
        """
        piece_NX = torch.cat([piece_NX, named_NX // length], 1)
        same_NXX = piece_NX[:, :, None] == piece_NX[:, None]
        again_NX = same_NXX.tril(-1).any(-1)  # it is one of those before
        own_NXL = weight(self._entries(piece_NX, length)).unflatten(1, (-1, length))
        own_NX = own_NXL.masked_fill_(again_NX[:, :, None], 0.0).flatten(1)
        # A named entry stands where its piece comes first.
        first_NX = (piece_NX[:, None] == (named_NX // length)[:, :, None]).int().argmax(-1)
        own_NX.scatter_(1, first_NX * length + named_NX % length, 0.0)
        others_NP = mass_NP.scatter(1, piece_NX, 0.0)
        return others_NP.sum(-1, keepdim=True) + own_NX.sum(-1, keepdim=True)


def ids_of(piece_NX: torch.Tensor, length: int) -> torch.Tensor:
    """Ids of the entries of some pieces, int64 [N, X L], piece by piece."""
    return (piece_NX[:, :, None] * length + torch.arange(length, device=piece_NX.device)).flatten(1)


@dataclass(frozen=True)
class _Normal:
    """Logits to log-probabilities."""

    highest: torch.Tensor  # [N, 1]
    log_mass: torch.Tensor  # [N, 1], relative to it

    def __call__(self, logits_NX: torch.Tensor) -> torch.Tensor:
        return logits_NX - self.highest - self.log_mass
