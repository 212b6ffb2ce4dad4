"""What we assume of Ray's object store: a trace stays there while it is referred to and no longer, and dies with the
actor that put it there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.contract import trace_store_run
from tests.contract.trace_store_run import RESPONSES, STEPS


@pytest.fixture(scope="module")
def seen() -> Any:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", trace_store_run.__name__]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_leaves_no_trace_behind(seen: Any) -> None:
    assert seen["steps"]["fetched"] == [list(range(RESPONSES - 1))] * STEPS
    # The script has waited for each step's end; while it runs there are its own traces, and nothing of the last one's.
    assert seen["steps"]["held"] == [RESPONSES] * STEPS


def test_a_reference_is_small(seen: Any) -> None:
    """Some 20 bytes a token and the figures; the script compares them with the trace's."""
    assert seen["bytes"]["stored"] < seen["bytes"]["trace"] / 10


def test_a_trace_whose_engine_died_is_an_error_that_says_so(seen: Any) -> None:
    assert "a trace is lost: the engine's actor that sampled the response has died" in seen["death"]
    assert "(OwnerDiedError)" in seen["death"]
