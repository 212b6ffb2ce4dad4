"""What the ranks of ranks.py are forked with: to import it takes a process ten seconds of a core."""

# ruff: noqa: E402 (a machine without CUDA must be prepared before the host is imported)
from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from skd_plugin.host import on_cpu

on_cpu.install()

import openrlhf.trainer.ppo_utils.experience_maker
import openrlhf.trainer.ray.ppo_actor
import openrlhf.trainer.ray.ppo_critic  # noqa: F401
