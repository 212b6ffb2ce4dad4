"""Trains a student two steps on fixed rollouts, its layers on one rank or spread over all; prints what the engines got
and what was saved.

python -m tests.contract.autotp_run FOLDER MODELS MODEL:STAGE:LAYOUT [...], once a rank, with RANK, WORLD_SIZE and
MASTER_PORT. MODELS is a folder with one for each MODEL.
"""

# ruff: noqa: E402 (a machine without CUDA must be prepared before the host is imported)
from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.contract import lora_run  # prepares this process
from tests.contract.packed_run import DISTILL, RANK, WORLD_SIZE

Run, loaded, same = lora_run.Run, lora_run.loaded, lora_run.same

import torch

from skd_plugin.host import on_cpu, weight_sync
from skd_plugin.seams import rebind


def train(folder: Path, model: Path, stage: int, layout: str) -> dict[str, Any]:
    run = Run(folder, str(model), stage, DISTILL, {}, layout, WORLD_SIZE)
    first = run.sent()
    again = run.sent()
    status = [run.step(0)]
    run.strategy.save_ckpt(run.actor.model, str(folder / "checkpoint"), tag="one")
    middle = run.sent()
    status.append(run.step(1))
    last = run.sent()
    run.strategy.save_model(run.actor, run.tokenizer, str(folder / "saved"))
    resumed = gone_on(folder, model, stage, layout) if folder.name == "llama:2:padded" else None
    if RANK:
        return {}
    return {
        "losses": [one["skd_loss"] for one in status],
        "norms": [one["actor_grad_norm"] for one in status],
        "untouched": same(first, loaded(model)) and same(again, first),
        "saved": same(last, loaded(folder / "saved")),
        "resumed": resumed is not None and same(last, resumed),
        "updates": [update(first, middle), update(middle, last)],
        "parts": sum(hasattr(parameter, "gather_params") for parameter in run.actor.model.module.parameters()),
    }


def gone_on(folder: Path, model: Path, stage: int, layout: str) -> dict[str, torch.Tensor]:
    run = Run(folder, str(model), stage, DISTILL, {}, layout, WORLD_SIZE)
    run.strategy.load_ckpt(run.actor.model, str(folder / "checkpoint"))
    run.step(1)
    return run.sent()


def update(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[float]:
    """A part of it, of every weight, which another run's is subtracted from."""
    return torch.cat([(after[name] - before[name]).flatten()[::53] for name in before]).tolist()


def main() -> None:
    folder, models = Path(sys.argv[1]), Path(sys.argv[2])
    on_cpu.adapt_trainer()
    rebind(weight_sync, "ray", SimpleNamespace(get=lambda refs: None, wait=lambda refs, num_returns: (refs, [])))
    found = {}
    for name in sys.argv[3:]:
        model, stage, layout = name.split(":")
        found[name] = train(folder / name, models / model, int(stage), layout)
    if RANK == 0:
        (folder / "autotp.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
