#!/usr/bin/env python3
"""Memory and time of the GPU recipes by the cost models, as the tables of docs/gpus.md.

    python scripts/estimate.py                                   # of every command in recipes/gpu-*.yaml
    python scripts/estimate.py RECIPE.yaml [key=value ...]       # of one recipe
    python scripts/estimate.py --acceptance 0.8 --length 0.3     # other assumptions

ESTIMATES: no GPU has run any of this.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from time_model import (
    GPUS,
    TRACE_BYTES,
    Gpu,
    StepTime,
    block_seconds,
    controller_bytes,
    controller_seconds,
    rollout_seconds,
    sequences_at_once,
    sleep_seconds,
    sync_seconds,
    tokens_per_block,
    training_seconds,
)
from transformers import AutoConfig

from skd_plugin.adapters import LoraOptions
from skd_plugin.check.environment import gpus_needed
from skd_plugin.check.memory_budget import Budget, make_budget
from skd_plugin.check.memory_model import ModelSize, in_gib, model_size
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.host_rules import planned_steps
from skd_plugin.config.recipe import load_recipe
from skd_plugin.config.schema import SKDConfig
from skd_plugin.models import load_model_config
from skd_plugin.prepare.load_run import read_models
from skd_plugin.prepare.task_prompts import longest_response

ROOT = Path(__file__).resolve().parents[1]
ACCEPTANCE = 0.95  # of the proposals at K = 25; skd/accept_rate of a run says what it is
GPUS_OF_A_NODE = 8
LENGTH = 0.5  # of the longest response allowed; skd/response_len says what it is


def _published(kind: str, hidden: int, layers: int, heads: int, kv: int, inner: int, rows: int, **others: Any) -> Any:
    """A model's configuration by the numbers of its config.json on the Hub, without asking the Hub."""
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=inner,
        vocab_size=rows,
        **others,
    )


TIED = dict(tie_word_embeddings=True)
LONG, LONGER = dict(max_position_embeddings=40960), dict(max_position_embeddings=131072)
PUBLISHED = {
    "google/gemma-2b-it": _published("gemma", 2048, 18, 8, 1, 16384, 256000, head_dim=256, **TIED),
    "google/gemma-7b-it": _published("gemma", 3072, 28, 16, 16, 24576, 256000, head_dim=256, **TIED),
    "Qwen/Qwen2-0.5B-Instruct": _published("qwen2", 896, 24, 14, 2, 4864, 151936, **TIED),
    "Qwen/Qwen2-7B-Instruct": _published("qwen2", 3584, 28, 28, 4, 18944, 152064, tie_word_embeddings=False),
    "Qwen/Qwen3-0.6B": _published("qwen3", 1024, 28, 16, 8, 3072, 151936, head_dim=128, **TIED, **LONG),
    "Qwen/Qwen3-1.7B": _published("qwen3", 2048, 28, 16, 8, 6144, 151936, head_dim=128, **TIED, **LONG),
    "Qwen/Qwen3-4B": _published("qwen3", 2560, 36, 32, 8, 9728, 151936, head_dim=128, **TIED, **LONG),
    "Qwen/Qwen3-8B": _published(
        "qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128, tie_word_embeddings=False, **LONG
    ),
    "Qwen/Qwen3-32B": _published(
        "qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128, tie_word_embeddings=False, **LONG
    ),
    "meta-llama/Llama-3.3-70B-Instruct": _published("llama", 8192, 80, 64, 8, 28672, 128256, **LONGER),
    "meta-llama/Llama-3.2-1B-Instruct": _published("llama", 2048, 16, 32, 8, 8192, 128256, **TIED, **LONGER),
    "meta-llama/Llama-3.1-8B-Instruct": _published("llama", 4096, 32, 32, 8, 14336, 128256, **LONGER),
}


@dataclass(frozen=True)
class Plan:
    """A command of a recipe, read as far as it goes without the models."""

    recipe: str
    overrides: tuple[str, ...]
    skd: SKDConfig
    options: HostOptions  # all of OpenRLHF's, dotted
    teacher: ModelSize
    student: ModelSize

    @property
    def name(self) -> str:
        task = [o.partition("=")[2] for o in self.overrides if o.startswith("skd.task.name=")]
        return " ".join([Path(self.recipe).stem.removeprefix("gpu-"), *task])

    @property
    def prompt_len(self) -> int:
        return self.options["data.max_len"] - self.response_limit

    @property
    def response_limit(self) -> int:
        return longest_response(self.skd, self.skd.rollout.max_new_tokens) or self.options["data.max_len"] // 2

    @property
    def responses(self) -> int:
        """Responses of a step."""
        return self.options["rollout.batch_size"] * self.options["rollout.n_samples_per_prompt"]

    @property
    def steps(self) -> int | None:
        """None where the recipe does not say how many prompts there are."""
        counts = [task.train_prompts for task in self.skd.all_tasks]
        if not counts or "full" in counts:
            return None
        return planned_steps(sum(counts), self.options["rollout.batch_size"], self.options["train.num_episodes"])

    @property
    def nodes(self) -> int:
        return self.options["actor.num_nodes"]

    def micro_batch(self, sequence_len: int) -> int:
        """Sequences of one forward of the training step, where they are `sequence_len` tokens long."""
        if not self.options["train.dynamic_batch_enable"]:
            return self.options["train.micro_batch_size"]
        return max(1, self.options["train.max_tokens_per_gpu"] // sequence_len)

    def budget(self, gpu: Gpu) -> Budget:
        return make_budget(self.teacher, self.student, self.skd, self.options, cpu=False, device=gpu.memory)


def read_plan(recipe: Path, overrides: Sequence[str]) -> Plan:
    models = read_models(load_recipe(recipe, overrides))
    skd, options = models.skd, models.options
    teacher = _size(skd.teacher.model_name_or_path, "teacher")
    student = _size(options["actor.model_name_or_path"], "student", LoraOptions.of(options))
    return Plan(recipe.name, tuple(overrides), skd, options, teacher, student)


def _size(name: str, role: str, lora: LoraOptions | None = None) -> ModelSize:
    return model_size(PUBLISHED[name] if name in PUBLISHED else load_model_config(name, role), lora)


def header_commands(recipe: Path) -> list[list[str]]:
    """The commands in a recipe's header, each as its words."""
    lines = re.findall(r"^#\s+((?:bash|sbatch) .*)$", recipe.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def all_plans() -> list[Plan]:
    """A plan of every command of the GPU recipes, each recipe with the same options once."""
    found: dict[tuple[str, ...], Plan] = {}
    for recipe in sorted((ROOT / "recipes").glob("gpu-*.yaml"), key=lambda path: path.stem):
        for words in header_commands(recipe):
            overrides = tuple(words[words.index(f"recipes/{recipe.name}") + 1 :])
            found.setdefault((recipe.name, *overrides), read_plan(recipe, overrides))
    return list(found.values())


def step_time(plan: Plan, gpu: Gpu, acceptance: float, length: float) -> StepTime:
    options, budget = plan.options, plan.budget(gpu)
    response_len = round(plan.response_limit * length)
    return StepTime(
        rollout=rollout_seconds(
            plan.teacher,
            plan.student,
            gpu,
            requests=budget.requests,
            at_once=sequences_at_once(budget.engine),
            prompt_len=plan.prompt_len,
            response_len=response_len,
            draft_len=plan.skd.rollout.most_drafts,
            acceptance=acceptance,
            split=options["vllm.tensor_parallel_size"],
        ),
        train=training_seconds(
            plan.student,
            gpu,
            sequences=plan.responses,
            sequence_len=plan.prompt_len + response_len,
            updates=plan.responses // options["train.batch_size"] * options["train.max_epochs"],
            ranks=gpus_needed(options)[0],
            across_nodes=gpus_needed(options)[0] > GPUS_OF_A_NODE,  # Ray packs the trainer onto as few as it can
            micro_batch=plan.micro_batch(plan.prompt_len + response_len),
            checkpointing=options["actor.gradient_checkpointing_enable"],
            rollout_logp=plan.skd.objective.uses_rewards,
        ),
        sync=sync_seconds(plan.student, gpu, across_nodes=plan.nodes > 1),
        sleep=sleep_seconds(
            budget.engine.teacher + budget.engine.student if options["vllm.enable_sleep"] else 0.0,
            budget.trainer.gradients + budget.trainer.optimizer if options["ds.enable_sleep"] else 0.0,
        ),
    )


def memory_table(plans: Sequence[Plan], gpu: Gpu) -> list[str]:
    rows = [
        f"| recipe | GPUs: train + sample | engine: weights | cache of a step | sampler | of {in_gib(gpu.memory)} "
        "| trainer: weights, gradients, optimizer, buffers | logits | activations | total |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for plan in plans:
        budget, (trainers, engines, _) = plan.budget(gpu), gpus_needed(plan.options)
        engine, trainer = budget.engine, budget.trainer
        cache = budget.requests * engine.kv_per_sequence
        states = trainer.total - trainer.logits - trainer.activations
        inside = [engine.teacher + engine.student, cache, engine.sampler, engine.peak]
        sizes = [*inside, states, trainer.logits, trainer.activations, trainer.total]
        places = f"{trainers}, shared" if plan.options["train.colocate_all"] else f"{trainers} + {engines}"
        cells = [plan.name, places, *(in_gib(size) for size in sizes)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def time_table(plans: Sequence[Plan], acceptance: float, length: float) -> list[str]:
    names = " | ".join(f"{gpu.name}: s a step | hours" for gpu in GPUS)
    rows = [f"| recipe | steps | responses, tokens a step | {names} |", "|---|---|---|" + "---|---|" * len(GPUS)]
    for plan in plans:
        tokens = plan.responses * round(plan.response_limit * length)
        cells = [plan.name, "-" if plan.steps is None else f"{plan.steps:,}", f"{plan.responses}, {tokens:,}"]
        for gpu in GPUS:
            time = step_time(plan, gpu, acceptance, length)
            parts = f"{time.rollout:.1f} + {time.train:.1f} + {time.sync:.1f}"
            hours = "-" if plan.steps is None else f"{time.total * plan.steps / 3600:.1f}"
            cells += [f"{time.total:.1f} ({parts})", hours]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def draft_table(plan: Plan, gpu: Gpu, drafts: Sequence[int], rates: Sequence[float], length: float) -> list[str]:
    """Response tokens a second of one engine, by the length of a block and the rate of acceptance."""
    requests = plan.budget(gpu).requests
    context = plan.prompt_len + plan.response_limit * length / 2
    rows = [
        "| acceptance | " + " | ".join(f"`draft_len` {length}" for length in drafts) + " |",
        "|---" * (1 + len(drafts)) + "|",
    ]
    for rate in rates:
        seconds = {
            n: block_seconds(plan.teacher, plan.student, gpu, requests=requests, context=context, draft_len=n)
            for n in drafts
        }
        speeds = {n: requests * tokens_per_block(rate, n) / seconds[n] for n in drafts}
        best = max(speeds, key=speeds.__getitem__)
        cells = [f"**{speed:,.0f}**" if n == best else f"{speed:,.0f}" for n, speed in speeds.items()]
        rows.append(f"| {rate:.0%} | {' | '.join(cells)} |")
    return rows


def large_table(plan: Plan, gpu: Gpu) -> list[str]:
    """A GPU of an engine with a teacher that is too large for one, by the number of them; otherwise as in `plan`."""
    pairs = [
        ("Qwen/Qwen3-32B", "Qwen/Qwen3-1.7B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    ]
    length = plan.options["data.max_len"]
    rows = [
        f"| teacher, student | `tensor_parallel_size` | weights | sequences of {length} at once "
        "| teacher in FP8: weights | sequences |",
        "|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        sizes = [_size(name, "model") for name in pair]
        for ranks in (1, 2, 4, 8):
            cells = [", ".join(name.split("/")[1].removesuffix("-Instruct") for name in pair), str(ranks)]
            for vllm in ({}, {"quantization": "fp8"}):
                skd = plan.skd.model_copy(update={"vllm": vllm})
                options = {**plan.options, "vllm.tensor_parallel_size": ranks}
                engine = make_budget(*sizes, skd, options, cpu=False, device=gpu.memory).engine
                room = f"{engine.sequences:,}" if engine.sequences else "does not fit"
                cells += [in_gib(engine.teacher + engine.student), room]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def scale_table(plan: Plan, gpu: Gpu, acceptance: float, length: float) -> list[str]:
    """The plan on other numbers of GPUs, half of them to train, with as many responses for each: what of a step stays
    as it is, and what grows.
    """
    rows = [
        "| GPUs | responses, tokens a step | rollout + training + weight sync | controller: CPU time | through it "
        "| traces of a node | all traces |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpus in (8, 64, 512):
        half, nodes = gpus // 2, gpus // GPUS_OF_A_NODE
        of_gpu = plan.responses // plan.options["vllm.num_engines"]
        responses = of_gpu * half
        options = plan.options | {
            "actor.num_nodes": nodes,
            "actor.num_gpus_per_node": half // nodes,
            "vllm.num_engines": half,
            "rollout.batch_size": responses // plan.options["rollout.n_samples_per_prompt"],
            "train.batch_size": responses,
        }
        time = step_time(replace(plan, options=options), gpu, acceptance, length)
        tokens = responses * round(plan.response_limit * length)
        cells = [
            str(gpus),
            f"{responses:,}, {tokens:,}",
            f"{time.rollout:.1f} + {time.train:.1f} + {time.sync:.1f} s",
            f"{controller_seconds(responses):.1f} s",
            f"{controller_bytes(responses, tokens) / 1e6:,.0f} MB",
            f"{tokens * TRACE_BYTES / nodes / 1e6:,.0f} MB",
            f"{tokens * TRACE_BYTES / 1e6:,.0f} MB",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def tables(plans: Sequence[Plan], acceptance: float = ACCEPTANCE, length: float = LENGTH) -> list[list[str]]:
    """Memory, time, the choice of draft_len for the pair of the last plan, larger teachers in its place, and the last
    plan on more GPUs.
    """
    drafts = draft_table(plans[-1], GPUS[1], (1, 2, 3, 5, 8), (0.3, 0.5, 0.7, 0.9, 0.98), length)
    return [
        memory_table(plans, GPUS[0]),
        time_table(plans, acceptance, length),
        drafts,
        large_table(plans[-1], GPUS[0]),
        scale_table(plans[-1], GPUS[1], acceptance, length),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="default: every command of the GPU recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--acceptance", type=float, default=ACCEPTANCE, help="default: %(default)s")
    parser.add_argument("--length", type=float, default=LENGTH, help="of the longest response; default: %(default)s")
    given = parser.parse_args()
    plans = [read_plan(given.recipe, given.overrides)] if given.recipe else all_plans()
    memory, time, drafts, large, scale = tables(plans, given.acceptance, given.length)
    print("ESTIMATES: no GPU has run this.")
    print(f"\nA {GPUS[0].name}:\n", *memory, sep="\n")
    print(f"\n{given.acceptance:.0%} accepted, responses of {given.length:.0%} of the longest:\n", *time, sep="\n")
    print(f"\nResponse tokens a second of one engine of {plans[-1].name}, {GPUS[1].name}:\n", *drafts, sep="\n")
    print(f"\nA {GPUS[0].name} of an engine with a larger teacher:\n", *large, sep="\n")
    print(f"\n{plans[-1].name} on more {GPUS[1].name}:\n", *scale, sep="\n")


if __name__ == "__main__":
    main()
