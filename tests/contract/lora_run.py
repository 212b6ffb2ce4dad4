"""Trains a student with adapters two steps on fixed rollouts; prints what the engines got and what was saved.

python -m tests.contract.lora_run FOLDER STUDENT STAGE:CASE [STAGE:CASE ...], once a rank, with RANK, WORLD_SIZE and
MASTER_PORT. CASE is a name of CASES. The rollouts are those of tests/contract/packed_run.py.
"""

# ruff: noqa: E402 (a machine without CUDA must be prepared before the host is imported)
from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.contract import packed_run  # prepares this process
from tests.contract import parity_run as rollout

RANK = packed_run.RANK

import torch
from openrlhf.utils import get_tokenizer

from skd_plugin.adapters import merge, weights
from skd_plugin.config.objective import Coefficients
from skd_plugin.host import chunked_actor, on_cpu, weight_sync
from skd_plugin.host.chunked_actor import ChunkedActor
from skd_plugin.host.policy_actor import SKDActorTrainer
from skd_plugin.host.samples import SKDExperienceMaker
from skd_plugin.seams import rebind

LORA = {"ds.lora.rank": 4, "ds.lora.alpha": 8}
FULL = [*packed_run.DISTILL, "skd.loss.vocabulary=full", "skd.loss.chunk=7"]
CASES: dict[str, tuple[list[str], dict[str, Any], str]] = {  # options of skd and of the host, layout
    "all linear layers": (packed_run.DISTILL, {"ds.lora.target_modules": ["all-linear"]}, "padded"),
    "the head": (FULL, {"ds.lora.target_modules": ["lm_head", "q_proj"]}, "dynamic"),
}


class Engines:
    """The engines' end of a sync."""

    def __init__(self) -> None:
        self.got: dict[str, torch.Tensor] = {}
        self._bucket: Any = None
        self.receive_student = SimpleNamespace(remote=self._expect)
        self.reset_prefix_cache = SimpleNamespace(remote=lambda: None)
        self.student_is = SimpleNamespace(remote=lambda version: None)

    def _expect(self, bucket: Any, into_teacher: bool) -> None:
        assert not into_teacher
        self._bucket = bucket

    def broadcast(self, flat: torch.Tensor, src: int, stream: Any) -> None:
        self.got |= dict(self._bucket.unpack(flat))


class Run:
    def __init__(
        self,
        folder: Path,
        model: str,
        stage: int,
        skd: list[str],
        options: dict[str, Any],
        layout: str,
        split: int = 1,
    ) -> None:
        """`split`: ranks over which DeepSpeed's AutoTP spreads each layer."""
        options = {"actor.gradient_checkpointing_enable": True, **options, "actor.model_name_or_path": model}
        self.args = args = packed_run.make_args(folder, stage, layout, options, skd)
        args.ds.tensor_parallel_size = split
        self.strategy = packed_run.make_strategy(args)
        actor = ChunkedActor(
            model, attn_implementation="sdpa", param_dtype="fp32", packing_samples=args.ds.packing_samples,
            lora_rank=args.ds.lora.rank, lora_alpha=args.ds.lora.alpha, lora_dropout=args.ds.lora.dropout,
            target_modules=args.ds.lora.target_modules, ds_config=self.strategy.get_ds_train_config(),
            chunk=args.skd.loss.chunk if split == 1 else None, vocab=packed_run.VOCAB,
        )  # fmt: skip
        self.tokenizer = get_tokenizer(model, actor.model, "left", self.strategy)
        actor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.actor, optimizer, scheduler = self.strategy.prepare((actor, packed_run.optimizer_of(args.actor)))
        self.trainer = SKDActorTrainer(
            self.strategy, self.actor, ema_model=None, actor_optim=optimizer, actor_scheduler=scheduler,
            micro_train_batch_size=args.train.micro_batch_size, tokenizer=self.tokenizer, vllm_engines=None,
        )  # fmt: skip
        self.trainer.objective.begin_step(Coefficients(kd=1.0, rl=0.0))

    def step(self, number: int) -> dict[str, float]:
        """OpenRLHF's status."""
        maker = SKDExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), self.strategy, self.tokenizer)
        experiences = rollout.rollouts(self.actor, maker, self.args, number)
        self.trainer.replay_buffer.append(packed_run.my_share(experiences, self.args, self.strategy))
        torch.manual_seed(number)
        status = self.trainer.ppo_train(0.0)
        self.trainer.replay_buffer.clear()
        return status

    def sent(self) -> dict[str, torch.Tensor]:
        """By name, on rank 0; empty on the others."""
        engines = Engines()
        self.trainer.vllm_engines, self.trainer._model_update_group = [engines], engines
        self.trainer.broadcast_to_vllm()
        return engines.got


def train(folder: Path, model: str, stage: int, case: str) -> dict[str, Any]:
    skd, options, layout = CASES[case]
    run = Run(folder, model, stage, skd, {**LORA, **options}, layout)
    before = {name: weight.base.data.clone() for name, weight in weights(run.actor.model.module)}
    first = run.sent()
    losses = [run.step(0)["skd_loss"]]
    run.strategy.save_ckpt(run.actor.model, str(folder / "checkpoint"), tag="one")
    losses.append(run.step(1)["skd_loss"])
    last = run.sent()
    run.strategy.save_model(run.actor, run.tokenizer, str(folder / "adapter"))
    frozen = {name: weight.base.data for name, weight in weights(run.actor.model.module)}
    assert stage == 3 or all(torch.equal(frozen[name], before[name]) for name in before), "the base has moved"
    again = Run(folder, model, stage, skd, {**LORA, **options}, layout)
    again.strategy.load_ckpt(again.actor.model, str(folder / "checkpoint"))
    again.step(1)
    resumed = again.sent()
    if RANK:
        return {}
    return {
        "losses": losses,
        "untouched": same(first, loaded(Path(model))),
        "saved": same(last, merged(folder)),
        "resumed": same(last, resumed),
        "files": sorted(path.name for path in (folder / "adapter").iterdir()),
        "moved": [name for name in first if not torch.equal(first[name], last[name])],
        "update": torch.cat([(last[name] - first[name]).flatten() for name in first])[::101].tolist(),
    }


def merged(folder: Path) -> dict[str, torch.Tensor]:
    merge(str(folder / "adapter"), folder / "merged", "float32")
    return loaded(folder / "merged")


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    on_cpu.adapt_trainer()
    chunked_actor.FEW_LOGITS = 0  # so that a chunk is of as few tokens as asked for
    rebind(weight_sync, "ray", SimpleNamespace(get=lambda refs: None, wait=lambda refs, num_returns: (refs, [])))
    found = {}
    for name in sys.argv[3:]:
        stage, case = name.split(":")
        found[name] = train(folder / name, model, int(stage), case)
    if RANK == 0:
        (folder / "lora.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
