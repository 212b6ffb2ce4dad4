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
import csv
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "speed"
PAIRS = {"quickstart": ROOT / "recipes" / "models" / "arithmetic", "smollm2": ROOT / ".cache" / "smollm2"}
COLUMNS = ("pair", "turn", "requests", "length", "way", "top_k", "draft_len", "seconds", "tokens", "kept")
BESIDE = ("teacher", "student", "vllm", "two", "assisted")
ASSISTED_TOKENS = 256  # that transformers writes in a turn: it takes long, and a prompt costs what another one costs
LEAST_TOKENS = 256  # of a run
ROOM = 64  # tokens of context behind the longest response, for drafts
ENTRIES = 32  # of the teacher that are kept a token, by us and by two engines, as in the quickstart


class Cell(NamedTuple):
    requests: int
    length: int

    @staticmethod
    def of(text: str) -> Cell:
        requests, length = text.split("x")
        return Cell(int(requests), int(length))


class Run(NamedTuple):
    """What a way took for a cell."""

    seconds: float
    tokens: int
    kept: float | None = None  # share of the tokens that are the student's

    @staticmethod
    def sum(runs: Sequence[Run]) -> Run:
        tokens, kept = sum(run.tokens for run in runs), [run.kept for run in runs if run.kept is not None]
        share = sum(run.tokens * own for run, own in zip(runs, kept, strict=True)) / tokens if kept else None
        return Run(sum(run.seconds for run in runs), tokens, share)


class Pair(NamedTuple):
    teacher: str
    student: str
    prompts: list[list[int]]
    max_len: int


def open_pair(name: str, length: int, requests: int, folder: Path) -> Pair:
    """Copies of the pair's models, whose end token is one that they don't write, with room for the longest response.

    Raises SystemExit where the models are not there.
    """
    from transformers import AutoTokenizer

    source = PAIRS[name]
    if not (source / "student").is_dir():
        sys.exit(
            f"{source} holds no models; make them by python scripts/make_smollm2_pair.py, or take --pair quickstart"
        )
    tokenizer = AutoTokenizer.from_pretrained(source / "student")
    prompts = tokenizer(texts(name, requests, tokenizer), add_special_tokens=False).input_ids
    max_len = max(map(len, prompts)) + length
    for role in ("teacher", "student"):
        without_end(source / role, folder / role, max_len + ROOM)
    return Pair(str(folder / "teacher"), str(folder / "student"), prompts, max_len)


def texts(name: str, number: int, tokenizer: Any) -> list[str]:
    if name == "quickstart":
        from skd_plugin.tasks.arithmetic import Arithmetic

        rng = random.Random(0)
        return [tokenizer.bos_token + " " + Arithmetic().draw(rng).prompt for _ in range(number)]
    lines = (PAIRS[name] / "train.jsonl").read_text().splitlines()[:number]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["input"]}], tokenize=False, add_generation_prompt=True
        )
        for line in lines
    ]


def without_end(source: Path, copy: Path, context: int) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    end = len(tokenizer) - 1  # the last of the vocabulary, which is rare in text
    config.max_position_embeddings = max(config.max_position_embeddings, context)
    config.eos_token_id = end
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    config.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    GenerationConfig(eos_token_id=end, pad_token_id=config.pad_token_id).save_pretrained(copy)
    (copy / "model.safetensors").symlink_to((source / "model.safetensors").resolve())


class Floor:
    """Seconds that the models of an engine take, heads included, alone: each call once more, right behind the first,
    with what that has left in the caches.
    """

    def __init__(self) -> None:
        self.seconds, self.second_time = 0.0, False

    def watch(self, worker: Any) -> None:
        """Passed to the engine, which calls it with its worker."""
        for model in (worker.model_runner.model, worker.model_runner.drafter.model):
            for name in ("forward", "compute_logits"):
                setattr(model, name, self._timed(getattr(model, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if self.second_time:
                started = time.process_time()
                call(*args, **kwargs)
                self.seconds += time.process_time() - started
            return result

        return timed


class Ours:
    def __init__(self, pair: Pair, draft_len: int) -> None:
        from skd_plugin.engine.arguments import EngineSpec
        from skd_plugin.engine.offline import SKDEngine

        spec = EngineSpec(
            teacher=pair.teacher,
            student=pair.student,
            draft_len=draft_len,
            max_len=pair.max_len,
            teacher_top_k=ENTRIES,
            student_top_k=0,
            loss_temperature=1.0,
            teacher_hidden=False,
            cpu=True,
            openrlhf={"enable_prefix_caching": False},
            options={},
        )
        self._engine = SKDEngine(spec)
        self._floor = Floor()
        self._engine._llm.collective_rpc(self._floor.watch)

    def run(self, prompts: list[list[int]], length: int, top_k: int, seed: int) -> Run:
        from skd_plugin.core.sampling import KEEP_ALL, SamplingSettings
        from skd_plugin.engine.sampling_rule import SamplingRule

        rule = SamplingRule(SamplingSettings(top_k=top_k or KEEP_ALL))
        started = time.process_time()
        samples = self._engine.generate(prompts, rule, length, seed=seed)
        seconds = time.process_time() - started
        tokens = sum(len(sample.trace) for sample in samples)
        return Run(seconds, tokens, sum(int((sample.trace.source == 0).sum()) for sample in samples) / tokens)

    def floor(self, prompts: list[list[int]], length: int, top_k: int, seed: int) -> Run:
        self._floor.seconds, self._floor.second_time = 0.0, True
        run = self.run(prompts, length, top_k, seed)
        self._floor.second_time = False
        return run._replace(seconds=self._floor.seconds)


def plain_engine(model: str, max_len: int, **options: Any) -> Any:
    """A vLLM engine as `skd train` would start it for a model alone, and no plugin in it."""
    from vllm import LLM

    return LLM(
        model=model,
        max_model_len=max_len + ROOM,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        disable_log_stats=True,
        max_num_batched_tokens=8192,
        max_logprobs=ENTRIES,
        **options,
    )


def write(engine: Any, prompts: list[list[int]], length: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def read(engine: Any, sequences: list[list[int]]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=ENTRIES, detokenize=False)
    engine.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)


def timed(work: Callable[[], Sequence[Sequence[int]]]) -> Run:
    started = time.process_time()
    responses = work()
    return Run(time.process_time() - started, sum(map(len, responses)))


class Alone:
    """Teacher and student in an engine each: alone, and one behind the other."""

    def __init__(self, pair: Pair) -> None:
        self._teacher, self._student = (plain_engine(path, pair.max_len) for path in (pair.teacher, pair.student))

    def teacher(self, prompts: list[list[int]], length: int) -> Run:
        return timed(lambda: write(self._teacher, prompts, length))

    def student(self, prompts: list[list[int]], length: int) -> Run:
        return timed(lambda: write(self._student, prompts, length))

    def two(self, prompts: list[list[int]], length: int) -> Run:
        def write_and_read() -> list[list[int]]:
            responses = write(self._student, prompts, length)
            read(self._teacher, [ids + own for ids, own in zip(prompts, responses, strict=True)])
            return responses

        return timed(write_and_read)


class Speculation:
    """vLLM's own, whose text is the teacher's law."""

    def __init__(self, pair: Pair, draft_len: int) -> None:
        import torch
        from vllm.v1.sample import rejection_sampler

        def expand(x: Any, ends: Any, number: int, replace_from: int = 0, replace_to: int = 0) -> Any:
            counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
            return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=number)

        # On a CPU vLLM 0.29 writes the temperatures of the proposals into a copy (`_expand_kernel_impl` of
        # utils/cpu_triton_utils.py asks for int64), so that the teacher's logits are divided by what memory held.
        rejection_sampler.expand_batch_to_tokens = expand
        drafts = {"method": "draft_model", "model": pair.student, "num_speculative_tokens": draft_len}
        self._engine = plain_engine(
            pair.teacher,
            pair.max_len,
            speculative_config={**drafts, "draft_sample_method": "probabilistic"},
            disable_hybrid_kv_cache_manager=True,
        )

    def run(self, prompts: list[list[int]], length: int) -> Run:
        return timed(lambda: write(self._engine, prompts, length))


class Assisted:
    """The way of the paper's released code: transformers, one prompt at a time."""

    def __init__(self, pair: Pair, draft_len: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._teacher, self._student = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (pair.teacher, pair.student)
        )
        config = self._student.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft_len, "constant"
        config.assistant_confidence_threshold = 0.0

    def run(self, prompts: list[list[int]], length: int) -> Run:
        import torch

        def work() -> list[list[int]]:
            responses = []
            for ids in prompts[: max(1, ASSISTED_TOKENS // length)]:
                text = self._teacher.generate(
                    torch.tensor([ids]),
                    assistant_model=self._student,
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=length,
                    min_new_tokens=length,
                )
                responses.append(text[0, len(ids) :].tolist())
            return responses

        return timed(work)


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


def make_ways(pair: Pair, given: Any) -> dict[tuple[str, int], Callable[[list[list[int]], int, int], Run]]:
    """By name and K, which is 0 where all is kept and where there is none."""
    from skd_plugin.engine.set_up import set_up_offline, set_up_skd

    set_up_offline()
    set_up_skd()
    ways: dict[tuple[str, int], Callable[[list[list[int]], int, int], Run]] = {}
    alone = Alone(pair) if {"teacher", "student", "two"} & set(given.beside) else None
    for name in given.beside:
        if name == "vllm":
            run = Speculation(pair, given.draft_len).run
        elif name == "assisted":
            run = Assisted(pair, given.draft_len).run
        else:
            run = getattr(alone, name)
        ways[name, 0] = lambda prompts, length, turn, run=run: run(prompts, length)
    ours = Ours(pair, given.draft_len)
    for top_k in given.top_k:
        ways["ours", top_k] = lambda prompts, length, turn, k=top_k: ours.run(prompts, length, k, turn)
        ways["floor", top_k] = lambda prompts, length, turn, k=top_k: ours.floor(prompts, length, k, turn)
    return ways


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
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    if not given.draw:
        whole = ("turn", "requests", "length", "top_k", "draft_len")
        there = {tuple(int(row[c]) if c in whole else row[c] for c in COLUMNS[:7]) for row in rows}
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            for row in measure(given, there):
                writer.writerow({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()})
                file.flush()
                print(row, flush=True)
        rows = list(csv.DictReader(path.read_text().splitlines()))
    found = summaries(rows)
    print(table(found))
    draw(found, given.out / "rollout.png")


if __name__ == "__main__":
    main()
