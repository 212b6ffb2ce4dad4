"""Acceptance on the same prompts over training: each checkpoint of a run samples for them once more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from plan import Plan, Run

from skd_plugin.core.accept import ACCEPTED, NOTHING, REFERENCE
from skd_plugin.core.trace import Trace

Row = dict[str, Any]


def measure_adaptivity(plan: Plan, folder: Path) -> list[Row]:
    if plan.adaptivity is None:
        return []
    seed, rows = plan.seeds[0], []
    for cell in plan.adaptivity.cells:
        run = plan.run(cell, plan.adaptivity.method, seed)
        if (folder / run.name / "model").is_dir():
            rows += _of_run(run, folder / run.name, plan.adaptivity.prompts)
    return rows


def _of_run(run: Run, folder: Path, count: int) -> list[Row]:
    """Prompts of the test split, and the same random numbers for each checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from skd_plugin.config.run import Run as Config
    from skd_plugin.rollout.engine import SKDEngine, engine_arguments
    from skd_plugin.rollout.rule import SamplingRule
    from skd_plugin.tasks import find_task

    config = Config.load(folder / "config.yaml")
    skd, student = config.skd, config.host["actor.model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    examples = find_task(skd.task.name)().examples("test", count, seed=run.seed)
    prompts = [tokenizer(example.prompt, add_special_tokens=False).input_ids for example in examples]
    engine = SKDEngine(
        **engine_arguments(
            skd.teacher.model_name_or_path,
            student,
            skd.rollout.draft_len,
            config.host["data.max_len"],
            skd.loss.top_k,
            **skd.vllm,
        )
    )
    rows = []
    for step, path in [(0, Path(student)), *_checkpoints(folder)]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        engine.load_student([(name, weight.detach()) for name, weight in model.named_parameters()])
        samples = engine.generate(prompts, SamplingRule.of(skd.rollout), skd.rollout.max_new_tokens, seed=run.seed)
        tokens = Trace.join([sample.trace for sample in samples])
        proposed = (tokens.draft_rank != NOTHING) & (tokens.source != REFERENCE)
        rows.append(
            {
                "task": run.task,
                "start": run.start,
                "step": step,
                "accepted": (tokens.source[proposed] == ACCEPTED).float().mean().item(),
                "kl": tokens.kl[~tokens.kl.isnan()].mean().item(),
                "tokens": len(tokens),
            }
        )
    return rows


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(re.search(r"(\d+)_hf$", path.name)[1]), path) for path in folder.glob("**/*[0-9]_hf")]
    return sorted(found)
