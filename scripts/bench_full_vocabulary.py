"""Time and peak memory of the full-vocabulary loss, forward and backward, beside a plain implementation.

    python scripts/bench_full_vocabulary.py --tokens 2048 --dtypes float32 bfloat16          # CPU
    python scripts/bench_full_vocabulary.py --device cuda --liger                            # the full size, on a GPU

Every measurement is a process of its own, and those of one repeat follow each other, so that all meet the same
machine. Time is wall time on a GPU, and on a CPU the CPU time of all threads, because that does not count what else
the machine does. Peak memory is what a run adds to its inputs (hidden states and heads), gradients included: on a CPU
the highest resident size (VmHWM) less the size before, on a GPU the highest allocated size less the one before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from skd_plugin.core.chunked import HeadLoss, against_teacher, chunked_scores
from skd_plugin.core.losses import forward_kl

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # student hidden, head, teacher hidden, head


def plain(inputs: Inputs) -> torch.Tensor:
    """Both models' logits in memory, float32 log-softmax, PyTorch's own KL."""
    student_NH, student_VH, teacher_NJ, teacher_VJ = inputs
    log_q_NV = F.linear(student_NH, student_VH).float().log_softmax(-1)
    with torch.no_grad():
        log_p_NV = F.linear(teacher_NJ, teacher_VJ).float().log_softmax(-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1).mean()


def ours(inputs: Inputs, chunk: int, foreseen: bool) -> torch.Tensor:
    """`foreseen`: the loss is a mean of the divergences, and the function is told so."""
    student_NH, student_VH, teacher_NJ, teacher_VJ = inputs
    expected = torch.ones(len(student_NH), device=student_NH.device) if foreseen else None
    tokens = torch.zeros(len(student_NH), dtype=torch.int64, device=student_NH.device)
    divergence = against_teacher(teacher_NJ, teacher_VJ, lambda rows, log_p, log_q: forward_kl(log_p, log_q))
    loss = HeadLoss(divergence, expected)
    return chunked_scores(student_NH, student_VH, tokens_N=tokens, chunk=chunk, loss=loss).loss.mean()


def liger(inputs: Inputs, chunk: int) -> torch.Tensor:
    """Liger's chunked Jensen-Shannon loss at beta 0, which is KL(p||q); its chunks are of tokens, too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student_NH, student_VH, teacher_NJ, teacher_VJ = inputs
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=student_NH.is_cuda, chunk_size=chunk
    )
    labels = torch.zeros(len(student_NH), dtype=torch.int64, device=student_NH.device)
    return loss(student_NH, student_VH, teacher_NJ, teacher_VJ, labels)


def implementations(chunk: int) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    return {
        "plain": plain,
        "ours": partial(ours, chunk=chunk, foreseen=True),
        "ours, computed twice": partial(ours, chunk=chunk, foreseen=False),
        "liger": partial(liger, chunk=chunk),
    }


def make_inputs(options: argparse.Namespace, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(rows: int, width: int, scale: float) -> torch.Tensor:
        made = torch.empty(rows, width, dtype=dtype, device=options.device)
        return made.normal_(generator=generator).mul_(scale)

    sizes = [(options.tokens, 1.0), (options.vocab, 0.0)]
    made = []
    for width in (options.student_width, options.teacher_width):
        made += [normal(rows, width, scale or 3 * width**-0.5) for rows, scale in sizes]
    made[0].requires_grad_()
    made[1].requires_grad_()
    return tuple(made)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Time and memory of one implementation, in this process."""
    torch.set_num_threads(options.threads)
    inputs = make_inputs(options, getattr(torch, options.dtypes[0]))
    run = implementations(options.chunk)[options.run]
    small = (inputs[0][:8].detach().requires_grad_(), inputs[1], inputs[2][:8], inputs[3])
    warm_up = inputs if options.device == "cuda" else small
    run(warm_up).backward()  # compilation, autotuning, thread pools
    for tensor in (*inputs[:2], small[0]):
        tensor.grad = None
    before = resident(options.device, reset=True)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    started = clock()
    loss = run(inputs)
    loss.backward()
    if options.device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - started
    peak = resident(options.device, peak=True)
    return {"seconds": seconds, "GB": (peak - before) / 1e9, "loss": loss.item(), "norm": inputs[0].grad.norm().item()}


def resident(device: str, *, reset: bool = False, peak: bool = False) -> int:
    """Bytes in use now, or their highest number since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts again from the present size
    name = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


def measure_apart(arguments: list[str], name: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments, "--run", name, "--dtypes", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}, {dtype}, failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--student-width", type=int, default=896, help="hidden size; 896 is Qwen2.5-0.5B's")
    parser.add_argument("--teacher-width", type=int, default=1536, help="hidden size; 1536 is Qwen2.5-1.5B's")
    parser.add_argument("--chunk", type=int, default=128, help="tokens whose logits are in memory at once")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=["plain", "ours", "ours, computed twice"])
    parser.add_argument("--liger", action="store_true", help="Liger's loss, too; needs the package liger-kernel")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.run:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.tokens} tokens, vocabulary {options.vocab}, widths {options.student_width} (student) and "
        f"{options.teacher_width} (teacher), chunks of {options.chunk}, {options.device}, {options.threads} threads, "
        f"torch {torch.__version__}, medians of {options.repeats}"
    )
    names = options.only + ["liger"] * options.liger
    for dtype in options.dtypes:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name in names:
                found[name].append(measure_apart(sys.argv[1:], name, dtype))
        report(dtype, found)


def report(dtype: str, found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{dtype:22}{'GB':>8}{'seconds':>10}{'memory':>9}{'time':>7}   loss")
    base = next(iter(found.values()))
    for name, runs in found.items():
        memory, seconds = (median(run[key] for run in runs) for key in ("GB", "seconds"))
        shares = [memory / median(run["GB"] for run in base)]
        shares.append(median(run["seconds"] / first["seconds"] for run, first in zip(runs, base, strict=True)))
        print(f"{name:22}{memory:8.2f}{seconds:10.1f}{shares[0]:9.3f}{shares[1]:7.2f}   {runs[0]['loss']:.6f}")


if __name__ == "__main__":
    main()
