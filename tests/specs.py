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
    loss_temperature=1.0,
    teacher_hidden=False,
    cpu=not torch.cuda.is_available(),
    openrlhf={},
    options={},
)


def make_spec(**fields: Any) -> EngineSpec:
    return replace(SPEC, **fields)
