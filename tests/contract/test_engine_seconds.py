"""Whose time the engines' seconds are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from skd_plugin.core.clock import Clock


class Engine:
    """Counts seconds until they are asked for, as the worker does."""

    def __init__(self) -> None:
        self.now, self.seconds = 0.0, 0.0
        self.take_seconds = SimpleNamespace(remote=self.take)

    def work(self, seconds: float) -> None:
        self.now, self.seconds = self.now + seconds, self.seconds + seconds

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, 0.0
        return {"verify": taken}


def test_an_evaluation_is_no_part_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from skd_plugin.host import run_samples, samples

    engine = Engine()

    def evaluate(self: Any, **kwargs: Any) -> list[Any]:
        engine.work(50.0)
        return ["evaluated"]

    def sample(self: Any, **kwargs: Any) -> tuple[list[Any], None, int, bool]:
        engine.work(3.0)
        engine.now += 1.0  # in which no engine works
        return [], None, 0, False

    monkeypatch.setattr(samples.SKDSamplesGenerator, "generate_eval_samples", evaluate)
    monkeypatch.setattr(samples.SKDSamplesGenerator, "generate_samples", sample)
    monkeypatch.setattr(run_samples.ray, "get", lambda refs: refs)
    generator = run_samples.RunSamples.__new__(run_samples.RunSamples)
    generator.clock, generator.vllm_engines = Clock(lambda: engine.now), [engine]
    generator.plan, generator.step = SimpleNamespace(at=lambda step: None), 0  # type: ignore[assignment]
    assert generator.generate_eval_samples() == ["evaluated"]
    generator.clock.lap()
    generator.generate_samples()
    assert generator.clock.lap() == pytest.approx({"rest": 0.0, "requests": 1.0, "verify": 3.0})
