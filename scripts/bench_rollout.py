"""Sampling beside every other way to have text that a teacher has looked at: same prompts, models, lengths, in turns.

    python scripts/bench_rollout.py                           # the quickstart's pair; some three minutes on one core
    python scripts/bench_rollout.py --turns 5                 # two more turns of what is there, and no other
    python scripts/bench_rollout.py --pair smollm2 --cells 1x64 8x64    # after scripts/make_smollm2_pair.py
    python scripts/bench_rollout.py --draw                    # only the table and the picture, of a CSV

A cell is a batch and a length, 64x256 for 64 responses of 256 tokens; acceptance is moved by K. Of each cell one turn
runs, one after the other, in one process and on one thread:

    ours      the engine of `skd train`, with traces, outside Ray, for each K
    floor     of each of these runs: its models' forwards alone, each timed a second time on the inputs that it had
    teacher   the teacher alone in vLLM
    student   the student alone in vLLM
    vllm      vLLM's speculative decoding with the same draft length: the text is the teacher's alone
    two       two engines: the student writes, the teacher reads it with prompt_logprobs
    assisted  transformers' assisted generation, one prompt at a time, of a few prompts

Seconds are of the process, which are those of the clock where nothing else wants its core. Ratios are of runs of one
turn, which share what else there is; the table has their median, lowest and highest. Every response is as long as the
cell says: the end token is one that no model writes, and the models' context is as long as is needed, whatever they
were trained for.

Writes results/speed/rollout.csv, one line a run, and rollout.png. A call goes on where the CSV ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from measured import read, write
from ways_of_sampling import PAIRS, RESULTS, Cell, Run, make_ways, open_pair

COLUMNS = ("pair", "turn", "requests", "length", "way", "top_k", "draft_len", "seconds", "tokens", "kept")
BESIDE = ("teacher", "student", "vllm", "two", "assisted")
LEAST_TOKENS = 256  # of a run


def measure(given: Any, there: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Lines of the table that are not there yet, as they are measured."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder = Path(tempfile.mkdtemp())
    try:
        longest = max(cell.length for cell in given.cells)
        most = max(cell.requests * max(1, LEAST_TOKENS // (cell.requests * cell.length)) for cell in given.cells)
        pair = open_pair(given.pair, longest, most, folder)
        ways = make_ways(pair, given)
        for way in ways.values():  # whatever is made at first
            way(pair.prompts[:2], 16, -1)
        for turn in range(given.turns):
            for cell in given.cells:
                for (way, top_k), run in ways.items():
                    line = (given.pair, turn, *cell, way, top_k, given.draft_len)
                    if line not in there:
                        taken = [run(batch, cell.length, turn) for batch in batches(cell, pair.prompts)]
                        yield dict(zip(COLUMNS, (*line, *Run.sum(taken)), strict=True))
    finally:
        shutil.rmtree(folder)


def batches(cell: Cell, prompts: list[list[int]]) -> list[list[list[int]]]:
    """One, or as many small ones as make the time long enough to be measured."""
    number, size = max(1, LEAST_TOKENS // (cell.requests * cell.length)), cell.requests
    return [prompts[place * size : (place + 1) * size] for place in range(number)]


class Spread(NamedTuple):
    """Of the turns."""

    middle: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        return Spread(median(values), min(values), max(values)) if values else None

    def __str__(self) -> str:
        least, middle, most = (
            f"{value:.{2 if self.middle < 9.95 else 0}f}" for value in (self.least, self.middle, self.most)
        )
        return middle if least == most else f"{middle} ({least} to {most})"


class Summary(NamedTuple):
    """Of a cell and a K."""

    pair: str
    cell: Cell
    top_k: int
    kept: float
    speed: Spread  # response tokens a second, ours
    by: dict[str, Spread | None]  # our speed by that of each other way, and by the floor


def summaries(rows: list[dict[str, str]]) -> list[Summary]:
    speeds, kept = {}, {}
    for row in rows:
        key = (row["pair"], Cell(int(row["requests"]), int(row["length"])), row["way"], int(row["top_k"]))
        speeds.setdefault(key, {})[int(row["turn"])] = float(row["tokens"]) / float(row["seconds"])
        if row["way"] == "ours":
            kept.setdefault(key, []).append(float(row["kept"]))
    found = []
    for (pair, cell, way, top_k), own in speeds.items():
        if way == "ours":
            others = {"floor": speeds.get((pair, cell, "floor", top_k), {})}
            others |= {name: speeds.get((pair, cell, name, 0), {}) for name in BESIDE}
            by = {
                name: Spread.of([own[turn] / other[turn] for turn in own if turn in other])
                for name, other in others.items()
            }
            share = median(kept[pair, cell, way, top_k])
            found.append(Summary(pair, cell, top_k, share, Spread.of([*own.values()]), by))
    return found


def table(found: list[Summary]) -> str:
    """In Markdown."""
    names = ("floor", *BESIDE)
    lines = [
        "| responses x tokens | K | kept | tokens/s | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for one in found:
        figures = " | ".join("" if one.by[name] is None else str(one.by[name]) for name in names)
        k = one.top_k or "all"
        lines.append(
            f"| {one.cell.requests} x {one.cell.length} | {k} | {one.kept:.0%} | {one.speed.middle:,.0f} | {figures} |"
        )
    return "\n".join(lines)


def draw(found: list[Summary], path: Path) -> None:
    import matplotlib.pyplot as plt

    names = ("floor", *BESIDE)
    figure, axis = plt.subplots(figsize=(8, 4))
    for place, name in enumerate(names):
        for number, one in enumerate(found):
            by = one.by[name]
            if by is not None:
                x = place + (number - len(found) / 2) * 0.8 / len(found)
                axis.plot([x, x], by[1:], "-", color=f"C{place}", linewidth=1)
                axis.plot(x, by.middle, "o", color=f"C{place}", markersize=3)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("our tokens a second by theirs")
    axis.set_title(f"a mark is a batch, a length and a K ({', '.join(sorted({one.pair for one in found}))})")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pair", choices=[*PAIRS], default="quickstart")
    parser.add_argument(
        "--cells", nargs="+", type=Cell.of, default=[Cell(n, t) for t in (64, 256) for n in (1, 8, 64)]
    )
    parser.add_argument("--top-k", nargs="+", type=int, default=[1, 3, 0], help="of the gate; 0: all is kept")
    parser.add_argument("--draft-len", type=int, default=2)
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=[*BESIDE], help="the ways that ours is beside")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    given = parser.parse_args()
    path = given.out / "rollout.csv"
    rows = read(path)
    if not given.draw:
        whole = ("turn", "requests", "length", "top_k", "draft_len")
        there = {tuple(int(row[c]) if c in whole else row[c] for c in COLUMNS[:7]) for row in rows}
        rows = write(path, COLUMNS, measure(given, there), keep=rows)
    found = summaries(rows)
    print(table(found))
    draw(found, given.out / "rollout.png")


if __name__ == "__main__":
    main()
