"""Rows of logits that stay where a model has put them, read some at a time.

At 256 requests with 5 drafts each and 151,936 entries one tensor [N, V] in float32 has 778 MB. So nothing here makes
one: who needs distributions reads the rows of a part, in float32, and lets go of them before the next.

Shapes: N rows, V vocabulary entries, S rows of the tensor in which they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skd_plugin.core.end_event import join_ends_

# Entries of the rows that are read at once. In float32 they are 4 MB, which stay in the cache of a CPU core, or 64 MB
# on a GPU, where fewer would be more kernels to start than work for them.
ENTRIES_ON_CPU = 1 << 20
ENTRIES_ON_GPU = 1 << 24


@dataclass(frozen=True)
class LogitRows:
    values_SV: torch.Tensor  # any float type
    rows_N: torch.Tensor  # int64, the row of each
    ends_E: torch.Tensor | None = None  # int64, tokens that end a turn, read as one; None: each by itself

    @classmethod
    def of(cls, values_NV: torch.Tensor) -> LogitRows:
        """All rows of a tensor."""
        return cls(values_NV, torch.arange(len(values_NV), device=values_NV.device))

    def select(self, rows: torch.Tensor | slice) -> LogitRows:
        return LogitRows(self.values_SV, self.rows_N[rows], self.ends_E)

    def read(self) -> torch.Tensor:
        """float32 [N, V], the caller's own to write into."""
        read_NV = self.values_SV.index_select(0, self.rows_N).float()
        return read_NV if self.ends_E is None else join_ends_(read_NV, self.ends_E)


def in_parts(count: int, values_SV: torch.Tensor) -> list[slice]:
    """Of `count` rows of these logits some at a time, as many as may be read at once."""
    entries = ENTRIES_ON_CPU if values_SV.device.type == "cpu" else ENTRIES_ON_GPU
    step = max(1, entries // values_SV.shape[1])
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
