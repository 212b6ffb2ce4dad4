"""`draft_len: auto` beside fixed lengths, in turns: the quickstart's pair, the engine of `skd train` outside Ray.

    python scripts/bench_draft_len.py                  # some three minutes on one core
    python scripts/bench_draft_len.py --turns 20 --top-k 3

For each K one engine of each length, and one that chooses. A turn runs 64 responses of 64 tokens in each, or as many
as the cell says, one engine after the other; what auto tries out counts. The tokens are those of the mean: a response
has half as many to half as many more, drawn for each turn, because 64 divide by each fixed length, so that none of
them would lose anything at the end. Seconds are of the process. Ratios are auto's
tokens a second by those of the fixed length that is the fastest over all turns.

Writes results/speed/draft_len.csv, one line a run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured import read, write
from ways_of_sampling import RESULTS, Cell, Ours, open_pair  # sets OMP_NUM_THREADS

FIXED, MOST = (1, 2, 4, 8), 8  # tokens; the most that auto may choose
COLUMNS = ("requests", "length", "top_k", "draft_len", "turn", "seconds", "tokens", "kept")


def measure(cells: list[Cell], ks: list[int], turns: int) -> Iterator[dict[str, Any]]:
    """Lines of the table, as they are measured. Args: ks: K, 0 for all."""
    folder = Path(tempfile.mkdtemp())
    try:
        pair = open_pair(
            "quickstart", max(cell.length for cell in cells) * 3 // 2, max(cell.requests for cell in cells), folder
        )
        engines: dict[str, Ours] = {str(draft_len): Ours(pair, draft_len) for draft_len in FIXED}
        for top_k in ks:
            engines["auto"] = Ours(pair, MOST, auto=True)  # anew: what it has learned of another K is no use
            for engine in engines.values():
                engine.run(pair.prompts[:2], 16, top_k, 0)  # whatever is made at first
            for cell in cells:
                for turn in range(turns):
                    lengths = drawn_lengths(cell, turn)
                    for name, engine in engines.items():
                        taken = engine.run(pair.prompts[: cell.requests], lengths, top_k, turn)
                        yield dict(zip(COLUMNS, (*cell, top_k, name, turn, *taken), strict=True))
    finally:
        shutil.rmtree(folder)


def drawn_lengths(cell: Cell, turn: int) -> list[int]:
    draw = random.Random(turn)
    return [draw.randint(cell.length // 2, cell.length * 3 // 2) for _ in range(cell.requests)]


def speed(rows: list[dict[str, str]]) -> float:
    return sum(float(row["tokens"]) for row in rows) / sum(float(row["seconds"]) for row in rows)


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown."""
    names = [*map(str, FIXED), "auto"]
    lines = [
        "| responses x tokens | K | kept | " + " | ".join(names) + " | auto by the best | behind the first turn |",
        "|---" * (5 + len(names)) + "|",
    ]
    for place in dict.fromkeys((row["requests"], row["length"], row["top_k"]) for row in rows):
        own = [row for row in rows if (row["requests"], row["length"], row["top_k"]) == place]
        of_each = {name: [row for row in own if row["draft_len"] == name] for name in names}
        speeds = {name: speed(runs) for name, runs in of_each.items()}
        best = max(names[:-1], key=lambda name: speeds[name])
        later = [
            speed([row for row in of_each[name] if row["turn"] != "0"] or of_each[name]) for name in ("auto", best)
        ]
        kept = sum(float(row["kept"]) for row in own) / len(own)
        figures = " | ".join(f"{speeds[name]:,.0f}" for name in names)
        k = "all" if place[2] == "0" else place[2]
        lines.append(
            f"| {place[0]} x {place[1]} | {k} | {kept:.0%} | {figures} | {speeds['auto'] / speeds[best]:.2f} "
            f"| {later[0] / later[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cells", nargs="+", type=Cell.of, default=[Cell(8, 64), Cell(64, 64)])
    parser.add_argument("--top-k", nargs="+", type=int, default=[1, 3, 0], help="of the gate; 0: all is kept")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table of the CSV")
    given = parser.parse_args()
    path = given.out / "draft_len.csv"
    if not given.table:
        import torch

        from skd_plugin.engine.set_up import set_up_offline

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        set_up_offline()
        write(path, COLUMNS, measure(given.cells, given.top_k, given.turns))
    print(table(read(path)))


if __name__ == "__main__":
    main()
