"""The values that OpenRLHF's numeric options may have. Its parser takes any number, and fails or trains on nonsense
an hour later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from skd_plugin.config.host_options import HostOptions
from skd_plugin.errors import RecipeError


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds; of an option with several values, each of them."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    off: float | None = None  # a value outside that OpenRLHF takes for "never" or "no limit"
    rising: bool = False  # of an option with two values: the first is not above the second

    def holds(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(self.holds, value)) and not (self.rising and value[0] > value[1])
        if self.off is not None and value == self.off:
            return True
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def words(self) -> str:
        """'0 or more and below 1', '-1, or 1 or more'."""
        parts = [
            f"{self.ge:g} or more" if self.ge is not None else "",
            f"above {self.gt:g}" if self.gt is not None else "",
            f"at most {self.le:g}" if self.le is not None else "",
            f"below {self.lt:g}" if self.lt is not None else "",
        ]
        bounds = " and ".join(filter(None, parts)) or "a finite number"
        rising = ", the first not above the second" if self.rising else ""
        return (f"{self.off:g}, or {bounds}" if self.off is not None else bounds) + rising


COUNT = Range(ge=1)  # of things without which nothing works: nodes, GPUs, samples, steps
NOT_NEGATIVE = Range(ge=0)
POSITIVE = Range(gt=0)
SHARE = Range(ge=0, le=1)
DECAY = Range(ge=0, lt=1)  # of a running mean
EVERY = Range(ge=1, off=-1)  # steps; -1 is never
FINITE = Range()

# Every numeric option of OpenRLHF's parser: tests/unit/test_host_ranges.py.
RANGES: dict[str, Range] = {
    **{f"{model}.num_nodes": COUNT for model in ("actor", "critic", "ref", "reward")},
    **{f"{model}.num_gpus_per_node": COUNT for model in ("actor", "critic", "ref", "reward")},
    "vllm.num_engines": COUNT,
    "vllm.tensor_parallel_size": COUNT,
    "vllm.gpu_memory_utilization": Range(gt=0, le=1),
    "data.max_len": Range(ge=3),  # two tokens of a prompt and one of a response
    "data.max_samples": COUNT,
    "data.max_images_per_prompt": NOT_NEGATIVE,
    "data.dataloader_num_workers": NOT_NEGATIVE,
    "rollout.batch_size": COUNT,
    "rollout.micro_batch_size": COUNT,
    "rollout.vllm_generate_batch_size": COUNT,
    "rollout.n_samples_per_prompt": COUNT,
    "rollout.max_new_tokens": COUNT,
    "rollout.max_tokens_per_gpu": COUNT,
    "rollout.temperature": POSITIVE,
    "rollout.top_p": Range(gt=0, le=1),
    "train.batch_size": COUNT,
    "train.micro_batch_size": COUNT,
    "train.max_tokens_per_gpu": COUNT,
    "train.max_epochs": COUNT,
    "train.num_episodes": COUNT,
    "train.async_queue_size": COUNT,
    "train.ema_beta": SHARE,
    "train.seed": Range(ge=0, lt=2**32),  # numpy's
    "eval.steps": EVERY,
    "eval.temperature": NOT_NEGATIVE,
    "eval.n_samples_per_prompt": COUNT,
    "ckpt.save_steps": EVERY,
    "ckpt.max_num": COUNT,
    "ckpt.max_mem": Range(gt=0, off=math.inf),
    "logger.logging_steps": COUNT,
    "local_rank": Range(ge=-1),
    "ds.zero_stage": Range(ge=0, le=3),
    "ds.zpg": COUNT,
    "ds.tensor_parallel_size": COUNT,
    "ds.ring_attn_size": COUNT,
    "ds.ring_attn_head_stride": COUNT,
    "ds.lora.rank": NOT_NEGATIVE,
    "ds.lora.alpha": COUNT,
    "ds.lora.dropout": DECAY,
    "actor.eps_clip": NOT_NEGATIVE,
    "actor.eps_clip_low_high": NOT_NEGATIVE,
    "actor.dual_clip": Range(gt=1),
    "actor.aux_loss_coef": NOT_NEGATIVE,
    "actor.entropy_coef": FINITE,
    "critic.value_clip": NOT_NEGATIVE,
    "critic.freezing_steps": Range(ge=-1),
    **{
        f"{model}.{name}": allowed
        for model in ("actor", "critic")
        for name, allowed in {
            "adam.lr": NOT_NEGATIVE,
            "adam.betas": DECAY,
            "adam.eps": NOT_NEGATIVE,
            "adam.weight_decay": NOT_NEGATIVE,
            "muon.lr": NOT_NEGATIVE,
            "muon.momentum": DECAY,
            "muon.ns_steps": COUNT,
            "lr_warmup_ratio": SHARE,
            "min_lr_ratio": SHARE,
            "max_norm": NOT_NEGATIVE,  # 0: no clipping
        }.items()
    },
    "algo.advantage.lambd": SHARE,
    "algo.advantage.gamma": SHARE,
    "algo.advantage.is_correction_threshold": POSITIVE,
    "algo.dynamic_filtering_range": Range(rising=True),
    "algo.kl.init_coef": NOT_NEGATIVE,
    "algo.kl.target": POSITIVE,
    "algo.kl.horizon": COUNT,
    "reward.clip_range": Range(rising=True),
    "reward.overlong_buffer_len": POSITIVE,
    "reward.overlong_penalty_factor": NOT_NEGATIVE,
    "reward.stop_properly_penalty_coef": FINITE,
}


def check_ranges(options: HostOptions) -> None:
    """Raises RecipeError for the first number that cannot be; what is None is not set."""
    for key, allowed in RANGES.items():
        value = options.get(key)
        if value is not None and not allowed.holds(value):
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise RecipeError(f"openrlhf.{key} is {shown}, but must be {allowed.words}")
