"""What sampling grows with: seconds against one thing at a time, fitted exponents, a cost model beside them. A CPU.

    python scripts/bench_growth.py                          # some five minutes on one core
    python scripts/bench_growth.py --repeats 1 --csv /tmp/growth.csv

One engine a line, with a random teacher and a random student that keep every proposal (K = V), so that a block has
`draft_len` tokens and nothing depends on luck. Around one base, one thing moves: requests, `draft_len`, kept teacher
entries, length, the student's size, the vocabulary; last K, with which more or less is kept. Repeats take turns; a
line's figure is its fastest one, because other work on a machine only adds.

The cost model is that of scripts/time_model.py in what it says of work: FLOPs of both models' forwards, the weights
that they read, a constant of a forward, here for each layer. A CPU adds what is small on a GPU: rows of logits, keys
and values, the search for a row's top, and what comes once a response, its prompt among it. Its constants are fitted,
each line is then predicted from constants fitted to all *others*, and that error is printed.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.engine.arguments import EngineSpec
from skd_plugin.engine.offline import SKDEngine
from skd_plugin.engine.sampling_rule import SamplingRule

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "recipes" / "models" / "arithmetic" / "student"
PROMPT_LEN, MAX_LEN, HEAD = 16, 1100, 32  # vLLM has no attention on a CPU for heads of 16


@dataclass(frozen=True)
class Cell:
    """A line: what is sampled, and by which models."""

    moved: str = "base"
    requests: int = 16
    draft_len: int = 4
    entries: int = 64  # of the teacher, kept a token
    length: int = 64  # tokens of a response
    student: int = 128  # width; it has a layer for each 64 of it
    vocab: int = 4096
    top_k: int = 4096
    teacher: int = 256


BASE = Cell()
MOVED: dict[str, tuple[int, ...]] = {
    "requests": (1, 4, 16, 64),
    "draft_len": (1, 2, 4, 8),
    "entries": (4, 64, 256, 1024),
    "length": (16, 64, 256, 512, 1024),
    "student": (64, 128, 192, 256),
    "vocab": (1024, 4096, 8192, 16384, 32768),
    "top_k": (1, 64, 1024, 4096),
}


def cells() -> list[Cell]:
    """The base once, and every other value of each thing."""
    found = [BASE]
    for name, values in MOVED.items():
        for value in values:
            if value != getattr(BASE, name):
                own = {name: value} | ({"top_k": value} if name == "vocab" else {})
                found.append(replace(BASE, moved=name, **own))
    return found


class Models:
    """Random Llamas, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, width: int, vocab: int) -> Path:
        path = self._folder / f"{width}-{vocab}"
        if not path.exists():
            torch.manual_seed(width)
            config = LlamaConfig(
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=max(1, width // 64),
                num_attention_heads=width // HEAD,
                num_key_value_heads=width // HEAD,
                vocab_size=vocab,
                max_position_embeddings=2 * MAX_LEN,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
            model = LlamaForCausalLM(config)
            with torch.no_grad():  # as alike as a student and its teacher are, and no response ends before its time
                model.lm_head.weight.mul_(0.2)
            model.save_pretrained(path)
            AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(path)
        return path


@dataclass(frozen=True)
class Size:
    """Of a model, as the cost model reads it."""

    layers: int
    parameters: int
    kv_per_token: int  # floats

    @staticmethod
    def of(width: int, vocab: int) -> Size:
        layers = max(1, width // 64)
        return Size(layers, layers * (4 + 9) * width**2 + vocab * width, 2 * layers * width)  # a lookup costs nothing


class Line:
    """A cell with its engine."""

    def __init__(self, cell: Cell, models: Models) -> None:
        self.cell = cell
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._kept: list[float] = []
        spec = EngineSpec(
            teacher=str(models.path(cell.teacher, cell.vocab)),
            student=str(models.path(cell.student, cell.vocab)),
            draft_len=cell.draft_len,
            max_len=MAX_LEN,
            teacher_top_k=cell.entries,
            student_top_k=0,
            loss_temperature=1.0,
            teacher_hidden=False,
            cpu=True,
            openrlhf={"enable_prefix_caching": False},
            options={"kv_cache_memory_bytes": 300 << 20, "max_num_batched_tokens": 4096},
        )
        self._engine = SKDEngine(spec)
        self.run(length=8)  # whatever is made at first
        self._seconds.clear(), self._tokens.clear(), self._kept.clear()

    def run(self, length: int | None = None) -> None:
        cell = self.cell
        rng = torch.Generator().manual_seed(len(self._seconds))
        prompts = torch.randint(3, 100, (cell.requests, PROMPT_LEN), generator=rng).tolist()
        rule = SamplingRule(SamplingSettings(top_k=cell.top_k), 0.0)
        started = time.perf_counter()
        samples = self._engine.generate(prompts, rule, length or cell.length, seed=len(self._seconds))
        self._seconds.append(time.perf_counter() - started)
        self._tokens.append(sum(len(sample.trace) for sample in samples))
        kept = sum(int((sample.trace.source == 0).sum()) for sample in samples)
        self._kept.append(kept / self._tokens[-1])

    @property
    def seconds_a_token(self) -> float:
        return min(s / t for s, t in zip(self._seconds, self._tokens, strict=True))

    @property
    def spread(self) -> float:
        """Slowest by fastest."""
        of_each = [s / t for s, t in zip(self._seconds, self._tokens, strict=True)]
        return max(of_each) / min(of_each)

    @property
    def kept(self) -> float:
        return median(self._kept)

    @cached_property
    def work(self) -> np.ndarray:
        """What a response token costs in units of the constants."""
        cell, kept = self.cell, self.kept
        of_block = sum(kept**place for place in range(cell.draft_len))  # tokens of a request that a block adds
        tokens = cell.requests * of_block
        teacher, student = Size.of(cell.teacher, cell.vocab), Size.of(cell.student, cell.vocab)
        drafted, checked = cell.requests * cell.draft_len, cell.requests * (cell.draft_len + 1)
        flops = 2 * (teacher.parameters * checked + student.parameters * drafted)
        context = PROMPT_LEN + cell.length / 2
        read = context * (teacher.kv_per_token * cell.requests + student.kv_per_token * drafted)
        layers = teacher.layers + cell.draft_len * student.layers
        weights = teacher.parameters + cell.draft_len * student.parameters
        block = [flops, layers, weights, cell.vocab * (checked + drafted), read]
        short_rows = (cell.vocab * cell.entries) ** 0.5  # entries of those that core/top_k.py sorts
        return np.array([*(each / tokens for each in block), short_rows, 1 / cell.length])


CONSTANTS = ("a FLOP", "a layer's forward", "a weight that a forward reads", "an entry of logits",
             "a float of keys and values", "an entry of a short row", "a response")  # fmt: skip


def fit(lines: list[Line]) -> np.ndarray:
    """Constants, none below 0, by least squares of relative errors."""
    work = np.stack([line.work / line.seconds_a_token for line in lines])
    scale = work.max(0)
    found, _ = nnls(work / scale, np.ones(len(lines)))
    return found / scale


def exponent(lines: list[Line], name: str) -> float:
    """b of seconds a token ~ value^b, least squares of logarithms."""
    values = np.log([getattr(line.cell, name) for line in lines])
    return float(np.polyfit(values, np.log([line.seconds_a_token for line in lines]), 1)[0])


def print_growth(lines: list[Line]) -> None:
    base = lines[0]
    print(f"\n{'moved':10} {'value':>6} {'ms a token':>11} {'tokens/s':>9} {'kept':>6} {'by base':>8} {'spread':>7}")
    for name in MOVED:
        own = sorted([base, *(line for line in lines if line.cell.moved == name)], key=lambda x: getattr(x.cell, name))
        for line in own:
            seconds = line.seconds_a_token
            print(
                f"{name:10} {getattr(line.cell, name):6d} {1e3 * seconds:11.3f} {1 / seconds:9.0f} {line.kept:6.1%}"
                f" {seconds / base.seconds_a_token:8.2f} {line.spread:7.2f}"
            )
        print(f"{'':10} seconds a token ~ {name}^{exponent(own, name):.2f}")


def print_model(lines: list[Line]) -> list[float]:
    """Returns the predictions, seconds a token."""
    for name, value in zip(CONSTANTS, fit(lines), strict=True):
        print(f"{value:.2e} s {name}")
    predicted = [float(line.work @ fit([other for other in lines if other is not line])) for line in lines]
    errors = [p / line.seconds_a_token - 1 for p, line in zip(predicted, lines, strict=True)]
    far = [(line, error) for line, error in zip(lines, errors, strict=True) if abs(error) > 0.2]
    print(f"error of a line that the constants have not seen: median {median(map(abs, errors)):.0%}, ", end="")
    print(f"largest {max(map(abs, errors)):.0%}, above 20 % in {len(far)} of {len(lines)}")
    for line, error in far:
        print(f"  {line.cell.moved} {getattr(line.cell, line.cell.moved, '')}: {error:+.0%}")
    return predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "speed" / "growth.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        models = Models(folder)
        lines = [Line(cell, models) for cell in cells()]
        for _ in range(given.repeats):
            for line in lines:
                line.run()
    finally:
        shutil.rmtree(folder)
    print_growth(lines)
    print("\nThe cost model:")
    predicted = print_model(lines)
    with given.csv.open("w", newline="") as file:
        names = [field.name for field in fields(Cell)]
        writer = csv.DictWriter(file, [*names, "kept", "ms_a_token", "spread", "predicted_ms"])
        writer.writeheader()
        for line, seconds in zip(lines, predicted, strict=True):
            row: dict[str, Any] = asdict(line.cell)
            row |= {"kept": f"{line.kept:.4f}", "ms_a_token": f"{1e3 * line.seconds_a_token:.4f}"}
            row |= {"spread": f"{line.spread:.2f}", "predicted_ms": f"{1e3 * seconds:.4f}"}
            writer.writerow(row)


if __name__ == "__main__":
    main()
