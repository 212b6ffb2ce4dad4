"""Acceptance on the same prompts over training: each checkpoint of a run samples for them once more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from plan import Plan, Run

from skd_plugin.run_folder import RunFolder, replace_text

Row = dict[str, Any]


def measure_adaptivity(plan: Plan, folder: Path) -> list[Row]:
    if plan.adaptivity is None:
        return []
    runs = [plan.run(cell, plan.adaptivity.method, plan.seeds[0]) for cell in plan.adaptivity.cells]
    finished = [run for run in runs if RunFolder(folder / run.name).model.is_dir()]
    return [row for run in finished for row in _kept(run, folder / run.name, plan.adaptivity.prompts)]


def _kept(run: Run, folder: Path, count: int) -> list[Row]:
    """Measured once a run, and kept in its folder."""
    path = folder / f"adaptivity-{count}.json"
    if not path.exists():
        replace_text(path, json.dumps(_of_run(run, folder, count)))
    return json.loads(path.read_text())


def _of_run(run: Run, folder: Path, count: int) -> list[Row]:
    """Prompts of the test split, and the same random numbers for each checkpoint."""
    from skd_plugin.engine.set_up import set_up_offline

    set_up_offline()
    from transformers import AutoModelForCausalLM

    from skd_plugin.config.host_options import host_defaults
    from skd_plugin.config.run import Run as Config
    from skd_plugin.core.metrics import figures_of, rollout_metrics
    from skd_plugin.engine.arguments import engine_for
    from skd_plugin.engine.offline import SKDEngine
    from skd_plugin.engine.sampling_rule import SamplingRule
    from skd_plugin.models import load_tokenizer
    from skd_plugin.tasks import find_task

    config = Config.load(RunFolder(folder))
    skd, student = config.skd, config.host["actor.model_name_or_path"]
    tokenizer = load_tokenizer(student, "student")
    examples = find_task(skd.task.name)().examples("test", count, seed=run.seed)
    prompts = [tokenizer(example.prompt, add_special_tokens=False).input_ids for example in examples]
    spec = engine_for(skd, {**host_defaults(), **config.host}, student=student, cpu=config.cpu)
    engine = SKDEngine(replace(spec, teacher_hidden=False))
    rows = []
    for step, path in [(0, Path(student)), *_checkpoints(folder)]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        engine.load_student([(name, weight.detach()) for name, weight in model.named_parameters()])
        samples = engine.generate(prompts, SamplingRule.of(skd.rollout), skd.rollout.max_new_tokens, seed=run.seed)
        metrics = rollout_metrics([figures_of(sample.trace, skd.rollout.most_drafts) for sample in samples])
        rows.append(
            {
                "task": run.task,
                "start": run.start,
                "step": step,
                "accepted": metrics["skd/accept_rate"],
                "kl": metrics["skd/kl"],
                "tokens": sum(len(sample.trace) for sample in samples),
            }
        )
    return rows


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(re.search(r"(\d+)_hf$", path.name)[1]), path) for path in folder.glob("**/*[0-9]_hf")]
    return sorted(found)
