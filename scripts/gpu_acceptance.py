"""The stages of scripts/gpu_acceptance.sh, each in processes of its own with a time-out, and the file they make."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from skd_plugin.config.versions import installed_versions
from skd_plugin.run.process import run_module
from skd_plugin.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "gpu-acceptance"  # logs and run folders
RECIPE = "recipes/quickstart.yaml"
HUB = [  # a real small pair with one vocabulary
    "skd.teacher.model_name_or_path=HuggingFaceTB/SmolLM2-360M-Instruct",
    "openrlhf.actor.model_name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct",
    "openrlhf.actor.adam.lr=1e-5",
    "openrlhf.data.max_len=256",
    "skd.rollout.top_k=25",
    "skd.loss.teacher_top_k=64",
]
SHORT = ["skd.task.train_prompts=1280", "skd.task.eval_prompts=32"]  # 20 steps of 64
ONE_GPU = [
    "skd.device=cuda",
    "openrlhf.train.colocate_all=true",
    "openrlhf.actor.num_gpus_per_node=1",
    "openrlhf.vllm.num_engines=1",
    "openrlhf.vllm.gpu_memory_utilization=0.3",
]
ASLEEP = ["openrlhf.vllm.enable_sleep=true", "openrlhf.ds.enable_sleep=true"]
FAST = ["openrlhf.ds.packing_samples=true", "openrlhf.train.dynamic_batch_enable=true"]
APART = ["skd.device=cuda", "openrlhf.actor.num_gpus_per_node=1", "openrlhf.vllm.num_engines=1"]
LAST_LINES = 30  # of a stage that failed
NOT_IN_IT = [  # what the pages say that no GPU has run, and what this script leaves out
    "several nodes, Slurm, and a run in the job of a Ray cluster with GPUs (docs/gpus.md)",
    "the recipes recipes/gpu-*.yaml themselves, and the estimates of their memory and time (docs/gpus.md)",
    "training beside an engine of several GPUs: weights by CUDA IPC or NCCL to each of its ranks (docs/gpus.md)",
    "teachers with rounded weights: FP8, GPTQ, AWQ (docs/gpus.md)",
    "ZeRO-3 and offloading over several ranks, with the loss over the full vocabulary too (docs/full_vocabulary.md)",
    "a mixture of experts that is trained; of its engine the stage `kernels` is the test (docs/faq.md)",
]


@dataclass(frozen=True)
class Stage:
    name: str
    shows: str
    module: list[str]  # what `python -m` gets
    limit_s: int
    keep: str = r"passed|failed|skipped"  # lines of its output that go into the report, if it ends well
    on_cpu: bool = True  # whether a rehearsal runs it, too
    gpus: int = 1
    needs: str | None = None  # a package that must be there
    run: str | None = None  # folder of the run whose steps go into the report
    pages: tuple[str, ...] = ()  # that call it untried


class TimeOut(Exception):
    pass


@dataclass(frozen=True)
class Result:
    stage: Stage
    state: str  # "ok", "FAILED", or "not run: ..."
    seconds: float
    lines: list[str]


def stages(*, hub: bool, cpu: bool) -> list[Stage]:
    """In their order. What they show is what the pages call untried."""
    pair = HUB if hub else []
    one = SHORT if cpu else [*SHORT, *ONE_GPU]

    def train(folder: str, shows: str, options: Sequence[str], **others: object) -> Stage:
        own = [
            f"skd.run_dir={FOLDER / folder}",
            "skd.eval.at_start=false",
            "skd.eval.teacher=false",
            "skd.resume=false",
        ]
        module = ["skd_plugin.cli", "train", RECIPE, *pair, *options, *own]
        return Stage(folder, shows, module, 300, keep=r"^$", run=folder, **others)  # type: ignore[arg-type]

    def tests(name: str, shows: str, files: Sequence[str], limit_s: int, **others: object) -> Stage:
        return Stage(name, shows, ["pytest", "-q", "-s", *files], limit_s, **others)  # type: ignore[arg-type]

    return [
        Stage(
            "environment", "versions, driver, GPU", ["scripts.gpu_acceptance", "--environment"], 60, keep=r".", gpus=0
        ),
        Stage(
            "check",
            "skd check --dry-run: parts of the engine, log-probs of both models beside transformers', memory",
            ["skd_plugin.cli", "check", RECIPE, *pair, *one, "--dry-run", f"skd.run_dir={FOLDER / 'check'}"],
            420,
            keep=r".",
            pages=("docs/check.md",),
        ),
        tests(
            "law",
            "chi-square of the tokens that the real engine emits, every gate",
            ["tests/engine/test_distribution.py", "tests/engine/test_gates.py"],
            420,
        ),
        tests(
            "kernels",
            "CUDA graphs, sleep at level 1, new weights of dense and MoE students, bfloat16",
            ["tests/engine/test_on_gpu.py"],
            420,
            keep=r"^gap|passed|failed|skipped",
            on_cpu=False,
            pages=("docs/faq.md",),
        ),
        tests(
            "sampler",
            "Triton's kernels, against float64 and against torch's operators, and in an engine",
            [f"tests/kernels/test_{name}.py" for name in ("triton_rows", "triton_draws", "engine")],
            240,
            needs="triton",
        ),
        Stage(
            "sampler-speed",
            "time, memory and waits of the sampler with torch's operators and with Triton's kernels",
            "scripts.bench_sampler --device cuda --vocab 151936 --dtype bfloat16".split()
            + "--kernels torch triton --top-p 1 0.5".split(),
            240,
            keep=r"^label",
            on_cpu=False,
            needs="triton",
            pages=("docs/gpus.md", "docs/rollout.md"),
        ),
        tests(
            "models",
            "attention windows, other architectures, traces, a student's own prompt",
            ["tests/engine/test_attention.py", "tests/engine/test_weights.py", "tests/engine/test_trace.py"],
            420,
        ),
        train(
            "train-asleep",
            "20 steps: trainer and engine take turns on a GPU (colocate_all, both sleep), weights through CUDA IPC, "
            "packed sequences under flash attention, dynamic batches",
            [*one, *([] if cpu else [*ASLEEP, *FAST])],
        ),
        train(
            "train-awake",
            "the same 20 steps without sleep and packing: their losses, and where a step goes in the GPU's own time",
            one,
            on_cpu=False,
            pages=("docs/reference.md",),
        ),
        train(
            "train-full-vocabulary",
            "20 steps of the loss over all tokens",
            [*one, *ASLEEP, "skd.loss.vocabulary=full"],
            on_cpu=False,
        ),
        train(
            "train-liger",
            "20 steps with ds.use_liger_kernel",
            [*one, *ASLEEP, "openrlhf.ds.use_liger_kernel=true"],
            on_cpu=False,
            needs="liger_kernel",
            pages=("docs/options.md",),
        ),
        Stage(
            "full-vocabulary",
            "time and memory of the loss over the full vocabulary",
            ["scripts.bench_full_vocabulary", "--device", "cuda", *_liger()],
            240,
            keep=r".",
            on_cpu=False,
            pages=("docs/full_vocabulary.md",),
        ),
        train("train-apart", "20 steps on two GPUs: weights by NCCL", [*SHORT, *APART], gpus=2, on_cpu=False),
        tests(
            "split",
            "an engine of two GPUs: the tokens and traces of one, before and after new weights",
            ["tests/engine/test_worker_ranks.py"],
            240,
            gpus=2,
            on_cpu=False,
        ),
        tests("ray-job", "a job of a Ray cluster uses it", ["tests/e2e/test_ray_job.py"], 120, on_cpu=False),
    ]


def _liger() -> list[str]:
    return ["--liger"] if importlib.util.find_spec("liger_kernel") else []


def reason_not_to(stage: Stage, *, cpu: bool) -> str | None:
    if cpu and not stage.on_cpu:
        return "needs a GPU"
    if not cpu and stage.gpus > torch.cuda.device_count():
        return f"needs {stage.gpus} GPUs"
    if stage.needs and importlib.util.find_spec(stage.needs) is None:
        return f"needs the package {stage.needs}"
    return None


def run(stage: Stage, folder: Path) -> Result:
    """Its process and all that it has started have ended when this returns."""
    log, started = folder / f"{stage.name}.log", time.monotonic()
    log.unlink(missing_ok=True)

    def look() -> None:
        if time.monotonic() - started > stage.limit_s:
            raise TimeOut

    try:
        status = run_module(stage.module, log, look, name=f"gpu-acceptance-{stage.name}")
        why = f"it ended with status {status}" if status else None
    except TimeOut:
        why = f"it took longer than {stage.limit_s} s, and was ended"
    lines = log.read_text(errors="replace").splitlines()
    seconds = time.monotonic() - started
    if why is not None:
        return Result(stage, "FAILED", seconds, [f"{why}; its last lines:", "", *lines[-LAST_LINES:]])
    kept = [line for line in lines if re.search(stage.keep, line)]
    return Result(stage, "ok", seconds, kept + (steps_of(folder / stage.run) if stage.run else []))


def steps_of(folder: Path) -> list[str]:
    """Losses and times of a run, a line for some steps; the first loss is also what the engine measured (skd/kl)."""
    steps = [record for record in RunFolder(folder).metrics.read() if "skd/loss" in record]
    names = ("skd/loss", "skd/kl", "skd/accept_rate", "time/rollout", "time/train", "time/sync", "tokens_per_s")
    shown = [step for index, step in enumerate(steps) if index in (0, 1) or index % 5 == 4]
    rows = [["step", *names]]
    rows += [[str(step["step"]), *(f"{step[name]:.4g}" if name in step else "-" for name in names)] for step in shown]
    table = ["  ".join(f"{cell:>15}" for cell in row) for row in rows]
    parts = {name: [step[name] for step in steps if name in step] for step in steps for name in step}
    times = [f"{name[5:]} {1e3 * median(own):.1f}" for name, own in parts.items() if name.startswith("time/")]
    return [*table, f"a step in ms, medians of {len(steps)}: {', '.join(times)}"] if steps else table


def report(results: Sequence[Result], words: Sequence[str]) -> str:
    failed = [result for result in results if result.state == "FAILED"]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        "# GPU acceptance of skd_plugin",
        f"{when}, commit {_commit()}, `bash scripts/gpu_acceptance.sh {' '.join(words)}`",
        f"**{len(failed)} of {len(results)} stages failed: {', '.join(r.stage.name for r in failed)}**"
        if failed
        else f"No stage failed; {sum(r.state == 'ok' for r in results)} of {len(results)} ran.",
        "\n".join(
            ["| stage | result | seconds | what it shows |", "|---|---|---|---|"]
            + [f"| {r.stage.name} | {r.state} | {r.seconds:.0f} | {r.stage.shows} |" for r in results]
        ),
    ]
    for result in sorted(results, key=lambda result: result.state != "FAILED"):
        if result.lines:
            command = " ".join(["python -m", *result.stage.module])
            sections += [f"## {result.stage.name}: {result.state}", f"`{command}`"]
            sections.append("\n".join(["```", *result.lines, "```"]))
    sections += ["## Not in it", "\n".join(f"- {line}" for line in NOT_IN_IT)]
    return "\n\n".join(sections) + "\n"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def print_environment() -> None:
    print(platform.platform(), "python", platform.python_version())
    for library in installed_versions():
        print(
            library.name, library.version or "not installed", "" if library.supported else f"WANTED {library.wanted}"
        )
    for name in ("flash_attn", "liger_kernel", "triton"):
        print(name, "is there" if importlib.util.find_spec(name) else "is not there")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, sm_{gpu.major}{gpu.minor}")
    if torch.cuda.is_available():
        print("CUDA of torch", torch.version.cuda)
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)


def accept(chosen: Sequence[Stage], out: Path, words: Sequence[str], skip: Callable[[Stage], str | None]) -> int:
    """Runs them one after the other, whatever becomes of each; the file is written after every one."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ["COLUMNS"] = "140"  # of the table of skd check
    results: list[Result] = []
    for stage in chosen:
        why = skip(stage)
        print(f"{stage.name}: {why or f'at most {stage.limit_s} s'} ...", flush=True)
        results.append(Result(stage, f"not run: {why}", 0.0, []) if why else run(stage, FOLDER))
        print(f"{stage.name}: {results[-1].state}, {results[-1].seconds:.0f} s", flush=True)
        out.write_text(report(results, words))
    print(f"{out} has all of it; please paste it into an issue")
    return int(any(result.state == "FAILED" for result in results))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="gpu_acceptance.sh")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: the stages that a CPU can run")
    parser.add_argument("--hub", action="store_true", help="SmolLM2-360M and 135M of the Hub, not the tiny pair")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages")
    parser.add_argument("--patience", type=float, default=1.0, help="times the time-outs; default: %(default)s")
    parser.add_argument("--list", action="store_true", help="name the stages")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_acceptance.md", help="default: %(default)s")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.environment:
        print_environment()
        return 0
    planned = stages(hub=given.hub, cpu=given.cpu)
    if given.list:
        print(*(f"{stage.name:22} {stage.shows}" for stage in planned), sep="\n")
        return 0
    unknown = set(given.only or ()) - {stage.name for stage in planned}
    if unknown:
        parser.error(
            f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in planned)}"
        )
    if not given.cpu and not torch.cuda.is_available():
        print(
            "gpu_acceptance.sh: torch sees no GPU (torch.cuda.is_available() is false). Run it on a machine with one, "
            "in the environment of `pip install -e '.[gpu,dev,tasks]'`; --cpu rehearses what a CPU can run.",
            file=sys.stderr,
        )
        return 2
    chosen = [
        replace(stage, limit_s=round(stage.limit_s * given.patience))
        for stage in planned
        if not given.only or stage.name in given.only
    ]
    return accept(chosen, given.out, words, lambda stage: reason_not_to(stage, cpu=given.cpu))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
