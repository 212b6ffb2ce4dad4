"""Sampling rules for tests, by their settings."""

from __future__ import annotations

from typing import Any

from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.engine.sampling_rule import SamplingRule


def make_rule(*, reference_share: float = 0.0, **settings: Any) -> SamplingRule:
    return SamplingRule(SamplingSettings(**settings), reference_share)
