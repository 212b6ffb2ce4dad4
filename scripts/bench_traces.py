"""What the controller of a run has to do with traces: bytes through it, its memory, its time. On a CPU.

    python scripts/bench_traces.py                                 # 128 responses of 8,192 tokens, 64 entries a token
    python scripts/bench_traces.py --responses 16 --hidden 4096    # with the teacher's hidden states (bfloat16)

Engines and policy actors are stand-ins that make traces at random and join them to micro-batches; between them are
OpenRLHF's and our own code: prompts to the engines, responses to Experience, a step's metrics, batches, and the way of
RayActorGroup to the actors.
"stored": the engine's actor puts a trace into Ray's object store, the response refers to it. "carried": the trace is
part of the response and of the batch, as before, and the controller joins all of them for the step's metrics.

Each way is a process of its own, which is the controller. Bytes are those of the messages that it reads and writes, as
Ray counts them. Memory is what the step adds to it: its own (anonymous), and the highest resident size, which counts
the pages of the object store that it looks at. Time is from the first prompt to the last batch at the actors:
wall time, and CPU time of the controller alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")  # as in a run

import ray
import torch

from skd_plugin.config.teacher import ONLY
from skd_plugin.core.metrics import figures_of, rollout_metrics
from skd_plugin.core.trace import Trace
from skd_plugin.host.asked import Asking, Begun, SampledBy
from skd_plugin.host.garbage import keep_what_is_there, look_less_often
from skd_plugin.host.trace_store import TRACE_KEY, StoredTrace, fetch
from skd_plugin.seams import rebind

DRAFT_LEN, PROMPT, MICRO_BATCH = 5, 16, 2
WAYS = ("carried", "stored")
SHARE_OF_A_MB = 1e6


def make_trace(tokens: int, top_k: int, hidden: int) -> Trace:
    ids = torch.randint(0, 150_000, (tokens,), dtype=torch.int32)
    known = torch.rand(8, tokens)
    return Trace(
        response_ids=ids,
        source=torch.randint(0, 2, (tokens,), dtype=torch.uint8),
        rejected_ids=torch.full((tokens,), -1, dtype=torch.int32),
        draft_rank=torch.randint(0, 50, (tokens,), dtype=torch.int32),
        student_logp=-known[0],
        teacher_logp=-known[1],
        kl=known[2],
        student_entropy=known[3],
        teacher_entropy=known[4],
        top_overlap=known[6],
        same_first=known[7].round(),
        teacher_topk_ids=torch.randint(0, 150_000, (tokens, top_k), dtype=torch.int32),
        teacher_topk_logp=torch.rand(tokens, top_k).log_softmax(-1),
        teacher_rest_tempered=-known[5],
        teacher_hidden=torch.rand(tokens, hidden).bfloat16() if hidden else torch.empty(0, 0),
    )


class Engine:
    """Answers a prompt at once, with a trace made before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._stored = options.run == "stored"
        self._trace = make_trace(options.tokens, options.top_k, options.hidden)
        self._begun = Begun()

    async def get_num_unfinished_requests(self) -> int:
        return 0

    async def ask(self, key: str, calls: list[dict[str, Any]]) -> None:
        await self._begun.begin(key, self._respond, calls)

    async def responses(self, key: str, prompts: int) -> list[dict[str, Any]]:
        return await self._begun.take(key, prompts)

    async def _respond(self, **_: Any) -> list[dict[str, Any]]:
        ids = self._trace.response_ids.tolist()
        return [
            {
                "prompt": "p", "label": "", "reward": None, "scores": None, "truncated": False, "extra_logs": {},
                "observation_tokens": [1] * PROMPT + ids, "action_ranges": [(PROMPT, PROMPT + len(ids))],
                TRACE_KEY: StoredTrace.put(self._trace, DRAFT_LEN) if self._stored else self._trace,
            }
        ]  # fmt: skip


class Policy:
    """A policy actor without a model."""

    def __init__(self) -> None:
        self._traces: list[Trace] = []

    def execute_batch(self, method_name: str, all_data: dict[str, list[Any]], start_idx: int, end_idx: int) -> None:
        for experience in all_data["experience"][start_idx:end_idx]:
            found = experience.info[TRACE_KEY]
            self._traces += found if isinstance(found[0], Trace) else fetch(found)

    def fit(self) -> int:
        starts = range(0, len(self._traces), MICRO_BATCH)
        tokens = sum(len(Trace.join(self._traces[start : start + MICRO_BATCH])) for start in starts)
        self._traces.clear()
        return tokens


class Tokenizer:
    pad_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[1] * PROMPT for _ in texts])


def step(options: argparse.Namespace, engines: list[Any], actors: list[Any]) -> dict[str, float]:
    """A step of the controller; what it read and wrote."""
    generator, maker = parts_of_a_run(engines)
    rule: Any = None
    asking = Asking(SampledBy(rule, 0))
    samples, _, _ = generator._generate_vllm(
        dataloader_iter=iter([(["data"], ["p"], [""], [None])] * options.responses),
        num_prompts=options.responses,
        dynamic_filtering=False,
        max_len=PROMPT + options.tokens,
        max_new_tokens=options.tokens,
        asking=asking,
    )
    traces = [sample.info[TRACE_KEY][0] for sample in samples]
    if options.run == "stored":
        metrics = rollout_metrics([trace.figures for trace in traces])
        batches = maker.make_experience_batch(samples)
    else:
        metrics = rollout_metrics([figures_of(Trace.join(traces), DRAFT_LEN)])
        batches = maker.split_rollout_samples(samples)
    ray.get(group_of(actors).async_run_method_batch(method_name="append", experience=batches))
    ray.get(engines[0].ask.remote("one more", [{}]))
    read = size(ray.get(engines[0].responses.remote("one more", 1))) * options.responses
    return {"read": read, "written": size(batches), "kl": metrics["skd/kl"]}


def parts_of_a_run(engines: list[Any]) -> tuple[Any, Any]:
    """OpenRLHF's sample generator and experience maker as a run without rewards has them."""
    from openrlhf.trainer.ppo_utils import samples_generator

    from skd_plugin.host.samples import CalmBar, RewardFreeExperienceMaker, SKDSamplesGenerator, _Teacher

    rebind(samples_generator, "tqdm", CalmBar)
    args = SimpleNamespace(
        train=SimpleNamespace(dynamic_batch_enable=False),
        rollout=SimpleNamespace(micro_batch_size=MICRO_BATCH, n_samples_per_prompt=1),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator="reinforce", is_correction_level="off"), dynamic_filtering_enable=False
        ),
    )
    strategy, tokenizer = SimpleNamespace(args=args), Tokenizer()
    plan: Any = None
    generator = SKDSamplesGenerator(strategy, None, None, tokenizer, engines, plan=plan, seed=0)
    generator._teachers = {ONLY: _Teacher(None, frozenset(), engines)}
    return generator, RewardFreeExperienceMaker(None, None, None, None, None, strategy, tokenizer)


def group_of(actors: list[Any]) -> Any:
    from openrlhf.trainer.ray.launcher import RayActorGroup

    group = object.__new__(RayActorGroup)
    group._actor_handlers, group.duplicate_actors = actors, 1
    return group


def size(message: Any) -> int:
    """Bytes of an object as Ray would send it."""
    return ray._private.worker.global_worker.get_serialization_context().serialize(message).total_bytes


def resident(name: str) -> float:
    """MB of this process; VmHWM is the highest resident size so far, RssAnon what it has of its own now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024 / SHARE_OF_A_MB


class OwnMemory(threading.Thread):
    """The highest RssAnon while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._over = resident("RssAnon"), threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, resident("RssAnon"))

    def end(self) -> float:
        self._over.set()
        self.join()
        return self.peak


def measure(options: argparse.Namespace) -> dict[str, float]:
    from skd_plugin.host import on_cpu

    on_cpu.install()
    hook = {"worker_process_setup_hook": "skd_plugin.host.on_cpu.install"}
    ray.init(
        address="local", num_cpus=options.engines + options.actors, object_store_memory=int(options.store * 1e9),
        include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=hook,
    )  # fmt: skip
    engines = [ray.remote(Engine).remote(options) for _ in range(options.engines)]
    actors = [ray.remote(Policy).remote() for _ in range(options.actors)]
    keep_what_is_there(), look_less_often()
    warm_up = argparse.Namespace(**vars(options) | {"responses": 2 * len(actors)})
    step(warm_up, engines, actors)
    ray.get([actor.fit.remote() for actor in actors])
    own, highest, watch = resident("RssAnon"), resident("VmHWM"), OwnMemory()
    watch.start()
    started, cpu_started = time.monotonic(), time.process_time()
    found = step(options, engines, actors)
    found |= {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu_started}
    found |= {"own": watch.end() - own, "resident": resident("VmHWM") - highest}
    assert sum(ray.get([actor.fit.remote() for actor in actors])) == options.responses * options.tokens
    ray.shutdown()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192, help="of each response")
    parser.add_argument("--top-k", type=int, default=64, help="teacher entries of a token")
    parser.add_argument("--hidden", type=int, default=0, help="width of the teacher's hidden states; 0: none")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--store", type=float, default=4.0, help="GB of the object store")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.run:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.responses} responses of {options.tokens} tokens, {options.top_k} entries and a hidden state of "
        f"{options.hidden} a token, {options.engines} engines, {options.actors} policy actors, ray {ray.__version__}"
    )
    print(f"{'':10}{'read, MB':>10}{'written, MB':>13}{'own memory':>12}{'resident':>10}{'s':>8}{'CPU s':>8}")
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--run", way], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        megabytes = [found[name] / SHARE_OF_A_MB for name in ("read", "written")] + [found["own"], found["resident"]]
        print(
            f"{way:10}{megabytes[0]:10.0f}{megabytes[1]:13.0f}{megabytes[2]:12.0f}{megabytes[3]:10.0f}"
            f"{found['seconds']:8.1f}{found['cpu_seconds']:8.1f}"
        )


if __name__ == "__main__":
    main()
