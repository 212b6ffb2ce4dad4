"""Ways to have text that a teacher has looked at, each ready to be timed: bench_rollout.py and bench_draft_len.py.

Every response is as long as it is asked to be: the end token is one that no model writes, and the models' context is
as long as is needed, whatever they were trained for. Seconds are of the process, on one thread.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "speed"
PAIRS = {"quickstart": ROOT / "recipes" / "models" / "arithmetic", "smollm2": ROOT / ".cache" / "smollm2"}
ASSISTED_TOKENS = 256  # that transformers writes in a turn: it takes long, and a prompt costs what another one costs
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
    def __init__(self, pair: Pair, draft_len: int, *, auto: bool = False) -> None:
        """Args: auto: the engine chooses its draft length, of up to `draft_len`."""
        from skd_plugin.engine.arguments import EngineSpec
        from skd_plugin.engine.offline import SKDEngine

        spec = EngineSpec(
            teacher=pair.teacher,
            student=pair.student,
            draft_len=draft_len,
            draft_len_auto=auto,
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

    def run(self, prompts: list[list[int]], length: int | list[int], top_k: int, seed: int) -> Run:
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
