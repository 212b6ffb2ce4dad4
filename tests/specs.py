"""An engine's spec for tests, by what it differs in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from skd_plugin.engine.arguments import EngineSpec

SPEC = EngineSpec(
    teacher="teacher",
    student="student",
    draft_len=2,
    max_len=16,
    teacher_top_k=4,
    student_top_k=0,
    loss_temperature=1.0,
    teacher_hidden=False,
    cpu=not torch.cuda.is_available(),
    openrlhf={},
    options={},
)


# On a GPU as on a CPU, exact enough to be compared token by token; and little memory, because several engines of one
# session stand beside each other.
ON_GPU = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.05}


def make_spec(**fields: Any) -> EngineSpec:
    """`options` win over what an engine of the tests has where there is a GPU."""
    spec = replace(SPEC, **fields)
    return replace(spec, options={**ON_GPU, **spec.options}) if torch.cuda.is_available() else spec
