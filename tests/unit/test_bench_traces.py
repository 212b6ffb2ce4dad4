"""scripts/bench_traces.py makes traces as they are, and the cost model counts their bytes."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import bench_traces
    import time_model

    return bench_traces, time_model


def test_a_token_has_the_bytes_of_the_cost_model(scripts: Any) -> None:
    bench_traces, time_model = scripts
    trace = bench_traces.make_trace(1000, 64, 0)
    held = sum(getattr(trace, field.name).nbytes for field in fields(trace))
    assert held == 1000 * time_model.TRACE_BYTES
    assert len(trace) == 1000 and trace.teacher_hidden.shape == (1000, 0)
