"""Trains a few steps on fixed rollouts with the host's policy trainer or with ours; prints what each step did.

python -m tests.contract.parity_run FOLDER host|skd   (a process each: ours rebinds a name of the host's module)
"""

# ruff: noqa: E402 (a machine without CUDA must be prepared before the host is imported)
from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ONE_RANK = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", **ONE_RANK, **os.environ}
os.environ.setdefault("MASTER_PORT", "29631")

import torch

from skd_plugin.host import on_cpu

on_cpu.install()

import openrlhf.trainer.ray.ppo_actor as host
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils import get_strategy, get_tokenizer

from skd_plugin.config.host_options import hierarchize, host_parser
from skd_plugin.config.objective import Coefficients
from skd_plugin.core.trace import Trace
from skd_plugin.host.trace_store import TRACE_KEY
from skd_plugin.prepare.load_run import load_run
from tests.contract.test_parity import ESTIMATORS, STEPS, VARIANTS
from tests.traces import trace_of

ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "recipes" / "models" / "arithmetic" / "student"
NUM_SAMPLES, PROMPT_LEN = 8, 6


def make_args(run_dir: Path, options: dict[str, Any], skd: Sequence[str] = ()) -> SimpleNamespace:
    overrides = [f"openrlhf.{key}={json.dumps(value)}" for key, value in options.items()]
    run = load_run(
        ROOT / "recipes" / "quickstart.yaml",
        [
            f"skd.run_dir={run_dir}", "skd.task.train_prompts=8", "skd.task.eval_prompts=1",
            "skd.rollout.method=on_policy", "skd.objective.kd_coef=0", "skd.objective.rl_coef=1",
            "openrlhf.rollout.batch_size=4", "openrlhf.rollout.n_samples_per_prompt=2",
            "openrlhf.rollout.micro_batch_size=4", "openrlhf.train.batch_size=8",
            "openrlhf.train.micro_batch_size=2", "openrlhf.train.max_epochs=2", *overrides, *skd,
        ],
    )  # fmt: skip
    args = hierarchize(host_parser().parse_args(run.host_argv()))
    args.actor.eps_clip_low_high = (args.actor.eps_clip, args.actor.eps_clip)
    args.ds.param_dtype = "fp32"
    args.skd = run.skd
    return args


def rollouts(actor: Actor, maker: RemoteExperienceMaker, args: SimpleNamespace, step: int) -> list[Experience]:
    """Responses of the student with random rewards and teacher; log-probabilities by the host's own forward."""
    generator = torch.Generator().manual_seed(step)
    samples = []
    for _ in range(NUM_SAMPLES):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        ids = torch.randint(3, 40, (1, PROMPT_LEN + length), generator=generator)
        mask = torch.zeros(1, PROMPT_LEN + length - 1, dtype=torch.long)
        mask[:, PROMPT_LEN - 1 :] = 1
        reward = torch.randn(1, generator=generator)
        with torch.no_grad():
            logp = actor(ids, mask, attention_mask=torch.ones_like(ids))
        trace = make_trace(ids[0, PROMPT_LEN:], logp[0, PROMPT_LEN - 1 :], generator)
        samples.append(
            Experience(
                sequences=ids, attention_mask=torch.ones_like(ids), action_mask=mask, action_log_probs=logp,
                base_action_log_probs=logp - 0.1 if args.algo.kl.use_loss else None, kl=torch.zeros_like(logp),
                rollout_log_probs=logp + 0.05 * torch.randn(logp.shape, generator=generator) * mask,
                rewards=reward, response_length=torch.tensor([length]), truncated=torch.tensor([False]),
                total_length=torch.tensor([ids.shape[1]]), prompts=[""], labels=[""], images=[None],
                mm_train_inputs=[None],
                info={"reward": reward, TRACE_KEY: [trace]},
            )
        )  # fmt: skip
    return maker.compute_advantages_and_returns(maker.split_rollout_samples(samples))


def make_trace(ids: torch.Tensor, student_logp: torch.Tensor, generator: torch.Generator) -> Trace:
    teacher = torch.randn(len(ids), 60, generator=generator).log_softmax(-1)
    top_logp, top_ids = teacher.topk(4, dim=-1)
    teachers = dict(teacher_topk_ids=top_ids.to(torch.int32), teacher_topk_logp=top_logp)
    return trace_of(ids, student_logp=student_logp, **teachers)


def train(kind: str, options: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    trainer_class, maker_class = classes_of(kind)
    args = make_args(run_dir, options)
    strategy = get_strategy(args)
    strategy.setup_distributed()
    torch.manual_seed(0)
    actor = Actor(
        str(STUDENT), attn_implementation="sdpa", param_dtype="fp32", ds_config=strategy.get_ds_train_config()
    )
    tokenizer = get_tokenizer(str(STUDENT), actor.model, "left", strategy)
    config = dict(
        optim="adam", muon=vars(args.actor.muon), adam=vars(args.actor.adam), lr_scheduler="constant",
        lr_warmup_ratio=0.0, min_lr_ratio=0.1, max_norm=1.0, scheduler_steps=100,
    )  # fmt: skip
    actor, optimizer, scheduler = strategy.prepare((actor, config))
    trainer = trainer_class(
        strategy, actor, ema_model=None, actor_optim=optimizer, actor_scheduler=scheduler,
        micro_train_batch_size=args.train.micro_batch_size, tokenizer=tokenizer, vllm_engines=None,
    )  # fmt: skip
    maker = maker_class(None, None, None, None, SimpleNamespace(value=0.0), strategy, tokenizer)
    norms = gradient_norms(actor)
    records = []
    for step in range(STEPS):
        for experience in rollouts(actor, maker, args, step):
            if kind == "host":
                experience.info.pop(TRACE_KEY)
            trainer.replay_buffer.append(experience)
        if kind == "skd":
            trainer.objective.begin_step(Coefficients(kd=0.0, rl=1.0))
        torch.manual_seed(step)  # of the shuffling into micro-batches
        status = trainer.ppo_train(args.algo.kl.init_coef)
        trainer.replay_buffer.clear()
        clip_ratio = status["ppo_clip_ratio" if kind == "host" else "rl_clip_ratio"]
        records.append({"loss": status["policy_loss"], "clip_ratio": clip_ratio, "gradient_norms": norms()})
    weights = torch.cat([p.detach().flatten() for p in actor.model.module.parameters()])
    return {"steps": records, "weights": [weights.sum().item(), weights.norm().item(), *weights[::50000].tolist()]}


def gradient_norms(actor: Actor) -> Any:
    """Norm of the gradient that each backward sends to the parameters; DeepSpeed keeps none in float32."""
    squares: list[float] = []
    parameters = list(actor.model.module.parameters())
    parameters[0].register_hook(lambda g: squares.append(g.pow(2).sum().item()))
    parameters[-1].register_hook(lambda g: squares.append(g.pow(2).sum().item()))

    def take() -> list[float]:
        taken = [value**0.5 for value in squares]
        squares.clear()
        return taken

    return take


def classes_of(kind: str) -> tuple[type, type]:
    on_cpu.adapt_trainer()
    if kind == "host":
        return host.ActorPPOTrainer, RemoteExperienceMaker
    from skd_plugin.host.policy_actor import SKDActorTrainer
    from skd_plugin.host.samples import SKDExperienceMaker

    return SKDActorTrainer, SKDExperienceMaker


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    cases = {name: {"algo.advantage.estimator": "group_norm", **options} for name, options in VARIANTS.items()}
    cases |= {name: {"algo.advantage.estimator": name} for name in ESTIMATORS}
    found = {name: train(kind, options, folder) for name, options in cases.items()}
    (folder / "parity.json").write_text(json.dumps(found))
