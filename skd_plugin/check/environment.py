"""Versions and devices of this machine."""

from __future__ import annotations

import platform

import psutil
import torch

from skd_plugin.check.findings import Finding
from skd_plugin.check.memory_model import GIB
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.versions import installed_versions
from skd_plugin.cpu import LOGICAL_GPUS
from skd_plugin.prepare.load_run import on_a_cluster

PYTHON = "3.11."  # openrlhf's wheel is built for it


def check_versions() -> list[Finding]:
    found, wrong = [f"python {platform.python_version()}"], []
    if not platform.python_version().startswith(PYTHON):
        wrong.append(Finding("python", platform.python_version(), "failed", f"use Python {PYTHON}x"))
    for library in installed_versions():
        if library.supported:
            found.append(f"{library.name} {library.version}")
        else:
            remedy = f"pip install '{library.wanted}', the tested version"
            wrong.append(Finding(library.name, library.version or "not installed", "failed", remedy))
    return [Finding("versions", ", ".join(found)), *wrong]


def device_memory(cpu: bool) -> int | None:
    """Bytes of one GPU (the smallest), or of this machine's memory; None where the GPUs are elsewhere."""
    if cpu:
        return psutil.virtual_memory().total
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def check_device(cpu: bool, options: HostOptions) -> Finding:
    """`options`: empty where they are not known."""
    if cpu:
        memory = psutil.virtual_memory()
        found = (
            f"CPU, {psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, "
            f"{memory.total / GIB:.0f} GiB of memory, {memory.available / GIB:.0f} GiB of it free"
        )
        return _against_the_need(found, LOGICAL_GPUS, options, "logical devices that Ray is given on a CPU")
    if not torch.cuda.is_available() and not on_a_cluster():
        return Finding(
            "device", "no GPU on this machine, and RAY_ADDRESS names no cluster", "failed", "use a GPU node"
        )
    if not torch.cuda.is_available():
        return Finding(
            "device",
            "no GPU on this machine; RAY_ADDRESS names a cluster, whose GPUs are not looked at",
            "warning",
            "run skd check on a node of the cluster to compare the estimates with its memory",
        )
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    found = f"{count} x {', '.join(names)}, {(device_memory(cpu) or 0) / GIB:.0f} GiB each"
    if on_a_cluster():
        return Finding("device", f"{found}, on this node of the cluster; {_need_in_words(options)}")
    return _against_the_need(found, count, options, "GPUs here")


def gpus_needed(options: HostOptions) -> tuple[int, int, int]:
    """GPUs of the trainer, the engines, and OpenRLHF's other models beside them (openrlhf.cli.train_ppo_ray.train).

    With train.colocate_all all of them share the trainer's.
    """

    def group(role: str) -> int:
        return options[f"{role}.num_nodes"] * options[f"{role}.num_gpus_per_node"]

    reference = group("ref") if options["algo.kl.init_coef"] > 0 and not options["train.colocate_actor_ref"] else 0
    critic = group("critic") if options["algo.advantage.estimator"] == "gae" else 0
    reward = group("reward") if options["reward.model_name_or_path"] else 0
    shared = min(critic, reward) if options["train.colocate_critic_reward"] else 0
    engines = options["vllm.num_engines"] * options["vllm.tensor_parallel_size"]
    return group("actor"), engines, reference + critic + reward - shared


def _need_in_words(options: HostOptions) -> str:
    if not options:
        return "what the recipe needs is not known"
    trainer, engines, others = gpus_needed(options)
    if options["train.colocate_all"]:
        return f"the recipe needs {trainer}, which trainer and engines share"
    rest = f", {others} for OpenRLHF's other models" if others else ""
    return f"the recipe needs {trainer + engines + others}: {trainer} to train, {engines} to sample{rest}"


def _against_the_need(found: str, count: int, options: HostOptions, what: str) -> Finding:
    if not options:
        return Finding("device", found)
    need = gpus_needed(options)[0] if options["train.colocate_all"] else sum(gpus_needed(options))
    if need > count:
        return Finding(
            "device",
            f"{found}; {_need_in_words(options)}, but there are {count} {what}",
            "failed",
            "Ray would wait for ever: lower openrlhf.actor.num_gpus_per_node or vllm.num_engines, or set "
            "openrlhf.train.colocate_all=true",
        )
    return Finding("device", f"{found}; {_need_in_words(options)}")
