"""Traces as columns of small integers, packed into one text that a page can hold.

The blob: gzip of [header length, uint32 little endian][header, JSON][columns], in base64. The header names each
column's place and type, and holds the strings. What is not stored as itself:

- log-probabilities, KL and entropy in thousandths of a nat, without the sign (`NONE` where the value does not
  exist), so a probability of 1 is told from one of 0.999, and the least one is e^-65;
- tokens as places in a table of the pieces that occur; place 0 is "no token";
- of the teacher's distribution only the `TOP` first entries.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from skd_plugin.core.trace import NOTHING, Source
from skd_plugin.report.pieces import Piece, Pieces
from skd_plugin.report.response import TOP, Response, read_response
from skd_plugin.report.run_record import RunRecord
from skd_plugin.run_folder import LeftOut, Record

NONE = 65535


@dataclass
class PackedTraces:
    """Grows by `add`; a row of `per_trace` a response, an entry of the token columns a token."""

    pieces: dict[tuple[int, Piece], int] = field(default_factory=dict)  # (id, text) -> place
    special: set[int] = field(default_factory=set)
    strings: dict[str, int] = field(default_factory=dict)
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    per_trace: list[dict[str, float]] = field(default_factory=list)

    def add(self, run: int, response: Response, place: Callable[[int], int]) -> None:
        """Args: place: token id -> its place in the table of pieces, of the run's tokenizer."""
        known = [value for value in response.kl if value is not None]
        top_ids = [_padded([place(id_) for id_ in row], 0) for row in response.top_ids]
        top_logp = [_padded(row, None) for row in response.top_logp]
        columns = {
            "token": [place(id_) for id_ in response.ids],
            "source": response.sources,
            "rejected": [0 if id_ == NOTHING else place(id_) for id_ in response.rejected],
            "rank": [rank + 1 for rank in response.draft_rank],  # 0: nothing was proposed
            "student": _milli(response.student_logp, -1),
            "teacher": _milli(response.teacher_logp, -1),
            "kl": _milli(response.kl, 1),
            "entropy": _milli(response.student_entropy, 1),
            "topToken": np.ravel(top_ids),
            "topLogp": _milli([value for row in top_logp for value in row], -1),
        }
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(np.asarray(values, dtype=np.int64))
        self.per_trace.append(
            {
                "run": run,
                "step": response.step,
                "length": len(response.ids),
                "meanKl": sum(known) / len(known) if known else 0.0,
                "maxKl": max(known, default=0.0),
                "replaced": response.sources.count(Source.REPLACED) / max(len(response.ids), 1),
                "cutOff": response.cut_off,
                "prompt": self._string(response.prompt),
                "response": self._string(response.text),
                "teacherPrompt": self._string(response.teacher_prompt),
                "teacherName": self._string(response.teacher_name),
            }
        )

    def blob(self) -> str:
        parts, header_columns, offset = [], {}, 0
        for name, values in self._all_columns().items():
            raw = values.tobytes()
            raw += bytes(-len(raw) % 4)  # a typed array must begin at a multiple of its width
            header_columns[name] = [values.dtype.name, offset, len(values)]
            parts.append(raw)
            offset += len(raw)
        tables = {"pieces": [*self.pieces], "special": sorted(self.special), "strings": [*self.strings]}
        header = json.dumps({"columns": header_columns, **tables}).encode()
        header += b" " * (-len(header) % 4)
        length = np.array([len(header)], dtype="<u4").tobytes()
        return base64.b64encode(gzip.compress(b"".join([length, header, *parts]), 6, mtime=0)).decode()

    def place(self, token_id: int, piece: Piece, special: bool) -> int:
        place = self.pieces.setdefault((token_id, piece), len(self.pieces) + 1)
        if special:
            self.special.add(place)
        return place

    def _string(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    def _all_columns(self) -> dict[str, np.ndarray]:
        columns = {name: _smallest(np.concatenate(chunks)) for name, chunks in self.columns.items()}
        for name in self.per_trace[0] if self.per_trace else ():
            values = np.array([row[name] for row in self.per_trace])
            columns[f"trace.{name}"] = values.astype("<f4") if values.dtype.kind == "f" else _smallest(values)
        return columns


def pack_traces(runs: list[RunRecord], pieces: list[Pieces], limit: int) -> PackedTraces:
    """The traces of all runs, at most `limit` of each, evenly spread over its file. Adds notes to the runs."""
    packed = PackedTraces()
    for number, (run, run_pieces) in enumerate(zip(runs, pieces, strict=True)):
        places: dict[int, int] = {}

        def place(token_id: int, pieces: Pieces = run_pieces, known: dict[int, int] = places) -> int:
            if token_id not in known:
                known[token_id] = packed.place(token_id, pieces[token_id], pieces.is_special(token_id))
            return known[token_id]

        left_out = LeftOut(run.folder.traces.path.name)
        for line, record in _spread(run, limit, left_out):
            response = read_response(record, line, left_out)
            if response is not None:
                packed.add(number, response, place)
        run.notes += left_out.notes()
    return packed


def corrections(packed: PackedTraces, run: int, count: int) -> list[tuple[Piece, Piece, int]]:
    """(rejected piece, the teacher's replacement, how often) of a run, the most frequent first."""
    lengths = [row["length"] for row in packed.per_trace]
    pairs: Counter[tuple[int, int]] = Counter()
    for index, row in enumerate(packed.per_trace):
        if row["run"] != run or not lengths[index]:
            continue
        replaced = packed.columns["source"][index] == Source.REPLACED
        rejected, token = (packed.columns[name][index][replaced].tolist() for name in ("rejected", "token"))
        pairs.update((was, now) for was, now in zip(rejected, token, strict=True) if was and was != now)
    texts = [text for _, text in packed.pieces]
    return [(texts[was - 1], texts[now - 1], times) for (was, now), times in pairs.most_common(count)]


def _spread(run: RunRecord, limit: int, left_out: LeftOut) -> Iterable[tuple[int, Record]]:
    total = run.folder.traces.count()
    if total > limit:
        run.notes.append(f"{limit:,} of the {total:,} traces are here, evenly spread (--traces).")
    for index, (line, record) in enumerate(run.folder.traces.scan(left_out)):
        if total <= limit or index * limit // total != (index - 1) * limit // total:
            yield line, record


def _padded(values: list, filler: int | None) -> list:
    return values + [filler] * (TOP - len(values))


def _milli(values: list[float | None], sign: int) -> np.ndarray:
    given = np.array([np.nan if value is None else sign * value for value in values], dtype=float)
    return np.where(np.isnan(given), NONE, np.clip(np.nan_to_num(given * 1000), 0, NONE - 1).round()).astype(np.int64)


def _smallest(values: np.ndarray) -> np.ndarray:
    top = int(values.max()) if len(values) else 0
    return values.astype("<u1" if top < 1 << 8 else "<u2" if top < 1 << 16 else "<u4")
