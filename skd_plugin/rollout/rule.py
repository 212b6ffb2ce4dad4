"""How responses are sampled: the gate's K and the two models' sampling settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from skd_plugin.config.schema import RolloutConfig
from skd_plugin.rollout.requests import RequestParams

KEEP_ALL = 2**31 - 1  # a K that no vocabulary reaches: every proposal is kept


@dataclass(frozen=True)
class SamplingRule:
    top_k: int
    student_temperature: float = 1.0
    student_top_p: float = 1.0
    teacher_temperature: float = 1.0
    teacher_top_p: float = 1.0
    gate: str = "top_k"
    threshold: float = 0.0

    @classmethod
    def of(cls, rollout: RolloutConfig) -> SamplingRule:
        return cls(
            top_k={"skd": rollout.top_k, "on_policy": KEEP_ALL, "teacher": 0}[rollout.method],
            gate=rollout.gate if rollout.method == "skd" else "top_k",
            threshold=rollout.threshold or 0.0,
            student_temperature=rollout.student_temperature,
            student_top_p=rollout.student_top_p,
            teacher_temperature=rollout.teacher_temperature,
            teacher_top_p=rollout.teacher_top_p,
        )

    def student_only(self, temperature: float, top_p: float = 1.0) -> SamplingRule:
        """Every proposal is kept: plain sampling of the student (greedy at temperature 0)."""
        return replace(self, gate="top_k", top_k=KEEP_ALL, student_temperature=temperature, student_top_p=top_p)

    def teacher_only(self, temperature: float, top_p: float = 1.0) -> SamplingRule:
        """No proposal is kept: plain sampling of the teacher."""
        return replace(self, gate="top_k", top_k=0, teacher_temperature=temperature, teacher_top_p=top_p)

    def request(self, prompt_ids: Sequence[int], trace_id: int, seed: int) -> RequestParams:
        return RequestParams(trace_id=trace_id, first_token=prompt_ids[-1], seed=seed, **vars(self))
