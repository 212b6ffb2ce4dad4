"""Trains two steps on fixed rollouts: padded, packed, packed in dynamic batches; prints what became of the weights.

python -m tests.contract.packed_run FOLDER STAGE [STAGE ...], once a rank, with RANK, WORLD_SIZE and MASTER_PORT.
The rollouts are those of tests/contract/parity_run.py, of which each rank takes its share.
"""

# ruff: noqa: E402 (a machine without CUDA must be prepared before the host is imported)
from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.contract import parity_run as rollout  # prepares this process
from tests.contract import ring_stand_in

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

import deepspeed
import openrlhf.trainer.ray.ppo_critic as host_critic
import torch
from openrlhf.models import get_llm_for_sequence_regression
from openrlhf.models.ring_attn_utils import set_ring_attn_group
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch, split_experience_batch
from openrlhf.utils import get_strategy, get_tokenizer

from skd_plugin.config.objective import Coefficients
from skd_plugin.core.trace import Source
from skd_plugin.host import chunked_actor, on_cpu
from skd_plugin.host.chunked_actor import ChunkedActor
from skd_plugin.host.critic import DynamicCriticTrainer
from skd_plugin.host.policy_actor import SKDActorTrainer
from skd_plugin.host.samples import SKDExperienceMaker
from skd_plugin.host.trace_store import TRACE_KEY
from skd_plugin.models import load_output_head

TEACHER = rollout.STUDENT.with_name("teacher")
STEPS, VOCAB = 2, 192
TOKENS = (
    40 if WORLD_SIZE == 1 else 30
)  # of a dynamic micro-batch: three or four of them a step, of 10 to 14 tokens each
DYNAMIC = {
    "train.dynamic_batch_enable": True,
    "train.max_tokens_per_gpu": TOKENS,
    "rollout.max_tokens_per_gpu": TOKENS,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"ds.packing_samples": True},
    "dynamic": {"ds.packing_samples": True, **DYNAMIC},
}
RINGS: dict[str, dict[str, Any]] = {  # of two ranks
    "ring": {"ds.packing_samples": True},
    "ring, dynamic": {"ds.packing_samples": True, **DYNAMIC},
}
DISTILL, BOTH = (
    ["skd.objective.kd_coef=1", "skd.objective.rl_coef=0"],
    ["skd.objective.kd_coef=1", "skd.objective.rl_coef=0.5"],
)
GROUPS = {"algo.advantage.estimator": "group_norm"}
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {  # options of skd, and of the host
    "top-k": (DISTILL, {}),
    "top-k, reweighted": ([*DISTILL, "skd.loss.reweight.by=divergence"], {}),
    "top-k, sequence mean": (DISTILL, {"actor.loss_agg_mode": "seq-mean-token-mean"}),
    "top-k and rewards": ([*BOTH, "skd.loss.chunk=7"], {**GROUPS, "actor.entropy_coef": 0.01}),
    "whole vocabulary": ([*DISTILL, "skd.loss.vocabulary=full", "skd.loss.chunk=7"], {}),
    "whole vocabulary and rewards": ([*BOTH, "skd.loss.vocabulary=full", "skd.loss.chunk=7"], GROUPS),
}
RINGED = ("top-k", "top-k and rewards", "whole vocabulary", "whole vocabulary and rewards")


def main() -> None:
    folder, stages = Path(sys.argv[1]), [int(stage) for stage in sys.argv[2:]]
    on_cpu.adapt_trainer()
    ring_stand_in.install()
    chunked_actor.FEW_LOGITS = 0  # so that a chunk is of as few tokens as asked for
    found: dict[str, Any] = {}
    for stage in stages:
        for case in CASES if stage == stages[0] else ("top-k", "whole vocabulary and rewards"):
            for layout in LAYOUTS:
                found[f"{stage}, {case}, {layout}"] = train(folder, stage, case, layout)
            if WORLD_SIZE == 2 and case in RINGED:
                for layout in RINGS:
                    found[f"{stage}, {case}, {layout}"] = train(folder, stage, case, layout)
        found[f"{stage}, critic, padded"] = train_critic(folder, stage, "padded", host_critic.CriticPPOTrainer)
        found[f"{stage}, critic, dynamic"] = train_critic(folder, stage, "dynamic", DynamicCriticTrainer)
        found[f"{stage}, host's critic"] = train_critic(folder, stage, "dynamic", host_critic.CriticPPOTrainer)
    if RANK == 0:
        (folder / "packed.json").write_text(json.dumps(found))


def train(folder: Path, stage: int, case: str, layout: str) -> dict[str, Any]:
    skd, options = CASES[case]
    args = make_args(folder, stage, layout, options, skd)
    strategy = make_strategy(args)
    actor = ChunkedActor(
        str(rollout.STUDENT), attn_implementation=attention_of(args), param_dtype="fp32",
        packing_samples=args.ds.packing_samples, ds_config=strategy.get_ds_train_config(),
        chunk=args.skd.loss.chunk, vocab=VOCAB,
    )  # fmt: skip
    tokenizer = get_tokenizer(str(rollout.STUDENT), actor.model, "left", strategy)
    actor, optimizer, scheduler = strategy.prepare((actor, optimizer_of(args.actor)))
    trainer = SKDActorTrainer(
        strategy, actor, ema_model=None, actor_optim=optimizer, actor_scheduler=scheduler,
        micro_train_batch_size=args.train.micro_batch_size, tokenizer=tokenizer, vllm_engines=None,
    )  # fmt: skip
    maker = SKDExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), strategy, tokenizer)
    trainer.objective.begin_step(Coefficients(kd=args.skd.objective.kd_coef, rl=args.skd.objective.rl_coef))
    shapes = watch_shapes(actor.model)
    first, norms, losses = weights(actor.model, stage), [], []
    for step in range(STEPS):
        asked = partial(actor, ring_attn_group=strategy.ring_attn_group)
        trainer.replay_buffer.append(my_share(rollout.rollouts(asked, maker, args, step), args, strategy))
        shapes.clear()
        torch.manual_seed(step)
        status = trainer.ppo_train(0.0)
        trainer.replay_buffer.clear()
        norms.append(status["actor_grad_norm"])
        losses.append(status["skd_loss"])
    return report(first, weights(actor.model, stage), norms, shapes) | {"losses": losses}


def train_critic(folder: Path, stage: int, layout: str, kind: type) -> dict[str, Any]:
    args = make_args(folder, stage, layout, {}, DISTILL)
    strategy = make_strategy(args)
    critic = get_llm_for_sequence_regression(
        str(rollout.STUDENT), "critic", attn_implementation="sdpa", param_dtype="fp32", value_head_prefix="score",
        init_value_head=True, packing_samples=args.ds.packing_samples, ds_config=strategy.get_ds_train_config(),
    )  # fmt: skip
    critic, optimizer, scheduler = strategy.prepare((critic, optimizer_of(args.critic)))
    trainer = kind(
        strategy, critic, optimizer, scheduler, micro_train_batch_size=args.train.micro_batch_size,
    )  # fmt: skip
    shapes = watch_shapes(critic)
    first, norms = weights(critic, stage), []
    for step in range(STEPS):
        items = [item for experience in critics_rollouts(step) for item in split_experience_batch(experience)]
        trainer.replay_buffer.append(make_experience_batch(items[RANK::WORLD_SIZE]))
        shapes.clear()
        torch.manual_seed(step)
        norms.append(trainer.ppo_train()["critic_grad_norm"])
        trainer.replay_buffer.clear()
    return report(first, weights(critic, stage), norms, shapes)


def make_args(folder: Path, stage: int, layout: str, options: dict[str, Any], skd: list[str]) -> SimpleNamespace:
    own = {
        "ds.zero_stage": stage,
        "train.max_epochs": 1,
        "train.micro_batch_size": 2,
        **(LAYOUTS | RINGS)[layout],
        **options,
    }
    args = rollout.make_args(folder, own, [f"skd.teacher.model_name_or_path={TEACHER}", *skd])
    args.actor.num_gpus_per_node = WORLD_SIZE
    if layout in RINGS:
        args.ds.ring_attn_size = WORLD_SIZE  # refused on a CPU, where its kernels are not
    return args


def attention_of(args: SimpleNamespace) -> str:
    return "sdpa" if args.ds.ring_attn_size == 1 else ring_stand_in.NAME


def make_strategy(args: SimpleNamespace) -> Any:
    set_ring_attn_group(None)  # of the last strategy
    args.ds.param_dtype = "bf16"  # as skd_plugin/host/bind.py does it
    strategy = get_strategy(args)
    args.ds.param_dtype = strategy.param_dtype = "fp32"
    strategy.setup_distributed()
    torch.manual_seed(0)
    return strategy


def optimizer_of(model: SimpleNamespace) -> dict[str, Any]:
    adam = vars(model.adam) | {"lr": 1e-3}
    return dict(
        optim="adam", muon=vars(model.muon), adam=adam, lr_scheduler="constant", lr_warmup_ratio=0.0, min_lr_ratio=0.1,
        max_norm=1.0, scheduler_steps=100,
    )  # fmt: skip


def my_share(experiences: list[Experience], args: SimpleNamespace, strategy: Any) -> Experience:
    """Each data-parallel rank's share of the samples, with a teacher that is known by the sample, whatever batch it
    stands in.
    """
    items = [item for experience in experiences for item in split_experience_batch(experience)]
    items.sort(key=lambda item: item.sequences.tolist())
    for item in items:
        trace = item.info[TRACE_KEY]
        generator = torch.Generator().manual_seed(int(trace.response_ids.sum()) * 131 + len(trace))
        trace.kl = torch.rand(len(trace), generator=generator)
        replaced = torch.rand(len(trace), generator=generator) < 0.3
        trace.source = torch.where(replaced, int(Source.REPLACED), int(Source.ACCEPTED)).to(torch.uint8)
        if args.skd.loss.vocabulary == "full":
            head = load_output_head(str(TEACHER), torch.float32, "cpu")
            trace.teacher_hidden = torch.randn(len(trace), head.shape[1], generator=generator)
            log_p = (trace.teacher_hidden @ head.T).log_softmax(-1)
            trace.teacher_logp = log_p.gather(1, trace.response_ids[:, None].long()).squeeze(1)
    ranks = strategy.ds_device_mesh["dp"]
    return make_experience_batch(items[ranks.get_local_rank() :: ranks.size()])


def critics_rollouts(step: int) -> list[Experience]:
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(rollout.NUM_SAMPLES):
        length = rollout.PROMPT_LEN + int(torch.randint(2, 9, (1,), generator=generator))
        mask = torch.zeros(1, length - 1, dtype=torch.long)
        mask[:, rollout.PROMPT_LEN - 1 :] = 1
        ids = torch.randint(3, 40, (1, length), generator=generator)
        values, returns = torch.randn(2, 1, length - 1, generator=generator)
        found.append(
            Experience(
                sequences=ids, attention_mask=torch.ones_like(ids), action_mask=mask, values=values, returns=returns,
                total_length=torch.tensor([length]), prompts=[""], labels=[""], images=[None], mm_train_inputs=[None],
                info={},
            )
        )  # fmt: skip
    return found


def watch_shapes(model: torch.nn.Module) -> list[list[int]]:
    """Sizes of the inputs of the training forwards."""
    shapes: list[list[int]] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(
        lambda module, args, output: shapes.append(list(args[0].shape)) if torch.is_grad_enabled() else None
    )
    return shapes


def weights(model: Any, stage: int) -> torch.Tensor:
    parameters = list(model.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])


def report(first: torch.Tensor, last: torch.Tensor, norms: list[float], shapes: list[list[int]]) -> dict[str, Any]:
    """`update` is a part of it, which another run's is subtracted from."""
    update = last - first
    return {"norms": norms, "shapes": shapes, "size": update.norm().item(), "update": update[::101].tolist()}


if __name__ == "__main__":
    main()
