"""What SKD's sampler costs beside the models' forwards: time, memory, bytes, waits. Needs torch and pydantic, no vLLM.

    python scripts/bench_sampler.py                                # a CPU, with a vocabulary that it can bear
    python scripts/bench_sampler.py --device cuda --vocab 151936 --dtype bfloat16 --kernels torch triton --top-p 1 0.5
    TRITON_INTERPRET=1 PYTHONPATH=.venv/triton python scripts/bench_sampler.py --kernels triton --repeats 1

The last counts memory, bytes and operators with Triton's kernels where there is no GPU (scripts/test.sh has put Triton
there); its times are those of Triton's interpreter, and say nothing.

A step is: --draft-len tokens drawn from the student's logits for every request, then the verification of all blocks:
gate, replacements, record. The models' logits are made beforehand; they are not counted, but what the sampler keeps of
them is. The two models differ by noise, so that --top-k sets how much is kept.

Each line has, for one number of requests: the share kept; milliseconds of a drafted token and of a verify step
(medians; on a CPU time of the process); the peak of memory in a step; bytes that operators have written, those of
small tensors among them; operators that wait for the device, on a GPU only (tests/unit/test_waits.py counts them
without one); all operators. For a comparison of two checkouts take turns.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
PROMPT = 50
TEACHER_TOP_K = 64


def pretend_vllm() -> None:
    """The sampler makes one record of vLLM's, and the drafter is a subclass of its own; nothing else of it runs."""

    def record(self: Any, *_: Any, **fields: Any) -> None:
        vars(self).update(fields)

    class Pretended(types.ModuleType):
        __path__: ClassVar[list[str]] = []

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": record, "__module__": "skd_bench"})

    class Finder:
        def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
            return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "vllm" else None  # type: ignore[arg-type]

        def create_module(self, spec: ModuleSpec) -> types.ModuleType:
            return Pretended(spec.name)

        def exec_module(self, module: types.ModuleType) -> None:
            return

    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]


class Counted(TorchDispatchMode):
    """Operators, those that wait for a device, and the bytes of what they make."""

    WAITS: ClassVar[set[str]] = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.waits, self.bytes, self._seen = 0, Counter[str](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        self.operators += 1
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        masks = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        sizes = name == "repeat_interleave" and kwargs.get("output_size") is None
        arrives = name == "_to_copy" and args[0].is_cuda and str(kwargs.get("device")) == "cpu"
        if name in self.WAITS or masks or sizes or (arrives and not kwargs.get("non_blocking")):
            self.waits[name] += 1
        made = func(*args, **kwargs)
        returned = made if isinstance(made, (tuple, list)) else [made]
        for tensor, said in zip(returned, func._schema.returns, strict=len(func._schema.returns) > 1):
            is_view = said.alias_info is not None and not said.alias_info.is_write
            if isinstance(tensor, torch.Tensor) and not is_view and name != "set_":
                self.bytes += tensor.numel() * tensor.element_size()
        return made


def leave_the_interpreter_out() -> None:
    """Triton's interpreter moves a kernel's arguments by PyTorch's operators, which no GPU needs."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def uncounted(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(*args, **kwargs)

    GridExecutor.__call__ = uncounted


class Step:
    """The engine around the sampler, for requests that all have drafts."""

    def __init__(self, options: argparse.Namespace, requests: int, kernels: str, top_p: float) -> None:
        from skd_plugin.core.sampling import SamplingSettings
        from skd_plugin.engine.kernels import rows_of
        from skd_plugin.engine.recorder import Recorder
        from skd_plugin.engine.request import RequestParams
        from skd_plugin.engine.request_table import RequestTable
        from skd_plugin.engine.sampler import SKDSampler

        self.options, self.requests, self.device = options, requests, torch.device(options.device)
        self.ids = [str(place) for place in range(requests)]
        settings = SamplingSettings(
            options.top_k,
            options.gate,
            options.threshold,
            student_top_p=top_p,
            teacher_top_p=top_p,
        )
        states = {
            name: SimpleNamespace(
                sampling_params=SimpleNamespace(
                    extra_args=RequestParams(
                        trace_id=place, prompt_len=PROMPT, first_token=3, seed=place, settings=settings
                    ).to_extra_args()
                )
            )
            for place, name in enumerate(self.ids)
        }
        self.table = RequestTable(states, self.device, min(TEACHER_TOP_K, options.vocab), options.vocab)
        batch = SimpleNamespace(
            req_ids=self.ids, num_reqs=requests, num_tokens_no_spec=np.full(requests, PROMPT + 10, dtype=np.int32)
        )
        self.runner = SimpleNamespace(
            num_spec_tokens=options.draft_len,
            device=self.device,
            input_batch=batch,
            discard_request_mask=SimpleNamespace(np=np.zeros(requests, bool)),
        )
        recorder = Recorder(min(TEACHER_TOP_K, options.vocab), 0, 1.0)
        dtype = getattr(torch, options.dtype)
        rows = rows_of(kernels, self.device, dtype, options.vocab, recorder.wanted)
        self.sampler = SKDSampler(self.runner, self.table, recorder, rows=rows)
        self.make_logits()

    def make_logits(self) -> None:
        """One head of the student's for all its places, and the teacher's: the same, and noise."""
        options, generator = self.options, torch.Generator(self.device).manual_seed(0)
        like = {"device": self.device, "dtype": getattr(torch, options.dtype)}
        self.student_BV = torch.empty(self.requests, options.vocab, **like).normal_(0, 5, generator=generator)
        rows = self.requests * (options.draft_len + 1)
        self.teacher_SV = torch.empty(rows, options.vocab, **like).normal_(0, options.noise, generator=generator)
        self.teacher_SV.view(self.requests, -1, options.vocab).add_(self.student_BV[:, None])
        self.place_N = torch.arange(rows, device=self.device).view(self.requests, -1)[:, :-1].flatten()

    def draft(self) -> torch.Tensor:
        from skd_plugin.engine.drafter import Drafting, SKDDrafter

        position_B = torch.full((self.requests,), PROMPT + 10, device=self.device)
        drafting = Drafting(self.table.rows(self.ids), position_B, self.options.draft_len)
        model = SimpleNamespace(compute_logits=lambda hidden: self.student_BV)
        drafter = SimpleNamespace(model=model, _table=self.table, _rows=self.sampler._rows)
        tokens = [
            SKDDrafter._sample_draft_tokens(drafter, None, drafting)[0]  # type: ignore[arg-type]
            for _ in range(self.options.draft_len)
        ]
        assert drafting.logits_LBV is not None
        token_BL = torch.stack(tokens, dim=1)
        self.table.keep_proposals(self.ids, drafting.logits_LBV, token_BL)
        return token_BL

    def schedule(self) -> None:
        """vLLM's part between the two: its scheduler knows how many drafts there are."""
        self.table.schedule({name: [0] * self.options.draft_len for name in self.ids})

    def verify(self, token_BL: torch.Tensor) -> torch.Tensor:
        metadata: Any = SimpleNamespace(
            num_draft_tokens=[self.options.draft_len] * self.requests,
            draft_token_ids=token_BL.flatten().int(),
            target_logits_indices=self.place_N,
        )
        return self.sampler(self.teacher_SV, metadata).sampled_token_ids

    def traces(self) -> list[Any]:
        return [record.trace() for record in self.table.take(range(self.requests))]


def synchronize(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(step: Any, device: str, repeats: int) -> dict[str, Any]:
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):  # the first is a warm-up
        start = synchronize(device)
        token_BL = step.draft()
        drafted = synchronize(device)
        step.schedule()
        before = synchronize(device)
        step.verify(token_BL)
        times.append((drafted - start, synchronize(device) - before))
    with Counted() as draft:
        token_BL = step.draft()
    step.schedule()
    with Counted() as verify:
        step.verify(token_BL)
    from skd_plugin.core.trace import Source, Trace

    gamma, most = step.options.draft_len, peak(step, device)
    on_gpu = device == "cuda"
    return {
        "kept": round((Trace.join(step.traces()).source == Source.ACCEPTED).float().mean().item(), 3),
        "ms_a_draft_token": round(1e3 * median(draft for draft, _ in times[1:]) / gamma, 3),
        "ms_a_verify_step": round(1e3 * median(verify for _, verify in times[1:]), 3),
        "peak_mb": round(most / 1e6),
        "gb_written_a_step": round((draft.bytes + verify.bytes) / 1e9, 3),
        "waits_a_draft_token": sum(draft.waits.values()) / gamma if on_gpu else None,
        "waits_a_verify_step": sum(verify.waits.values()) if on_gpu else None,
        "operators_a_step": draft.operators + verify.operators,
    }


def peak(step: Any, device: str) -> int:
    """The most memory that a step takes beside the models' logits, bytes."""

    def whole() -> None:
        token_BL = step.draft()
        step.schedule()
        step.verify(token_BL)

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        whole()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256], help="requests at once")
    parser.add_argument("--draft-len", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the logits")
    parser.add_argument(
        "--kernels", nargs="+", default=["auto"], choices=["auto", "torch", "triton"], help="skd.rollout.kernels"
    )
    parser.add_argument("--gate", default="top_k")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the gate, if it has one")
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0], help="of both models")
    parser.add_argument("--noise", type=float, default=0.5, help="by which the models' logits differ")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--label", default="", help="first column of the CSV")
    parser.add_argument("--csv", type=Path, help="a file to which the lines are added")
    return parser.parse_args()


def main() -> None:
    options = parse()
    pretend_vllm()
    if os.environ.get("TRITON_INTERPRET") and "triton" in options.kernels:
        leave_the_interpreter_out()
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    for requests, kernels, top_p in product(options.batch, options.kernels, options.top_p):
        with torch.no_grad():
            found = measure(Step(options, requests, kernels, top_p), options.device, options.repeats)
        setting = {
            "label": options.label,
            "machine": machine,
            "requests": requests,
            "draft_len": options.draft_len,
            "vocab": options.vocab,
            "dtype": options.dtype,
            "kernels": kernels,
            "gate": options.gate,
            "top_k": options.top_k,
            "top_p": top_p,
        }
        line = setting | found
        print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
        if options.csv:
            new = not options.csv.exists()
            with options.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, line, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(line)


if __name__ == "__main__":
    main()
