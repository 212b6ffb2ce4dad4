"""What of a recipe goes with a teacher that is elsewhere (skd.teacher.url) and reads finished texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skd_plugin.config.loss import LossConfig
from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.config.teacher import TeacherConfig
from skd_plugin.config.vllm_options import OF_TEACHER
from skd_plugin.core.methods import METHODS
from skd_plugin.core.prompt_weights import PROMPT_WEIGHTINGS
from skd_plugin.core.targets import REGIONS
from skd_plugin.core.token_weights import WEIGHTINGS

FEW = "a server says the K most probable tokens of each place and not the whole distribution"


def refuse_unserved(teacher: TeacherConfig, rollout: RolloutConfig, loss: LossConfig, vllm: Mapping[str, Any]) -> None:
    """Raises ValueError for what a served teacher cannot do, with the reason."""
    why = "the teacher is elsewhere (teacher.url)"
    _refuse_method(rollout.method)
    if teacher.follow is not None:
        raise ValueError(f"teacher.follow moves the engine's own teacher, but {why}; leave one of the two out")
    if loss.vocabulary == "full":
        raise ValueError(f"loss.vocabulary: full needs the teacher's hidden states, but {why}; use top_k")
    if loss.temperature != 1:
        raise ValueError(
            f"loss.temperature is {loss.temperature:g}, but {why}: what all other tokens have at that temperature is "
            f"not known, as {FEW}; use 1"
        )
    if loss.student_top_k:
        raise ValueError(f"loss.student_top_k asks the teacher for the student's tokens, but {why}, and {FEW}")
    of_whole = [
        ("loss.reweight.by", loss.reweight.by, WEIGHTINGS[loss.reweight.by].of_whole),
        ("loss.prompts.by", loss.prompts.by, PROMPT_WEIGHTINGS[loss.prompts.by].of_whole),
        *(("loss.regions", region.where, REGIONS[region.where].of_whole) for region in loss.regions),
    ]
    for option, name, needs_it in of_whole:
        if needs_it:
            raise ValueError(f"{option}: {name} cannot be computed: {why}, and {FEW}")
    rounding = [name for name in OF_TEACHER if vllm.get(name) is not None]
    if rounding:
        raise ValueError(f"vllm.{rounding[0]} would round the student: {why}; give it to vllm serve")


def _refuse_method(name: str) -> None:
    method = METHODS[name]
    if method.source == "student":
        return
    allowed = ", ".join(name for name, other in METHODS.items() if other.source == "student")
    reason = (
        "a gate asks the teacher before every token, which would be a journey to the server for each block of tokens"
        if method.has_gate
        else "a server is asked to read finished texts, and not to write them"
    )
    raise ValueError(
        f"rollout.method is '{name}', but the teacher is elsewhere (teacher.url): {reason}. Use {allowed}, or a "
        "teacher in the engine (without teacher.url)"
    )
