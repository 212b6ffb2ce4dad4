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


def test_the_cost_model_counts_as_many_messages_as_a_run_has(scripts: Any) -> None:
    from skd_plugin.host.asked import AT_ONCE

    _, time_model = scripts
    assert time_model.MESSAGES == AT_ONCE
    of_response, of_message = time_model.CONTROLLER_S
    assert time_model.controller_seconds(64) == pytest.approx(64 * (of_response + of_message))
    assert time_model.controller_seconds(4096) == pytest.approx(4096 * of_response + AT_ONCE * of_message)
