"""Text from two sources, under a gate that follows the rate of acceptance, with the whole vocabulary."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.running import NUM_STEPS, steps, traces

pytestmark = pytest.mark.e2e


def test_references_and_samples_in_one_run(finished_run: tuple[Path, str]) -> None:
    folder, printed = finished_run
    assert printed.count("skd.rollout.reference_compat: as in SKD's released code") == 1
    records, lines = steps(folder), traces(folder)
    assert len(records) == NUM_STEPS and len(lines) == 8 * NUM_STEPS
    assert {frozenset(line["source"]) & {"r"} for line in lines} == {frozenset("r"), frozenset()}
    assert all(set(line["source"]) <= set("st") or set(line["source"]) == {"r"} for line in lines)
    assert all(record["skd/loss"] == pytest.approx(record["skd/kl"], rel=1e-3) for record in records)
    expected = 4.0
    for record in records:
        own = [line for line in lines if line["step"] == record["step"]]
        tokens = "".join(line["source"] for line in own)
        assert record["skd/reference_frac"] == pytest.approx(tokens.count("r") / len(tokens))
        rate = tokens.count("s") / (tokens.count("s") + tokens.count("t"))
        assert record["skd/accept_rate"] == pytest.approx(rate)
        assert record["skd/top_k"] == max(1, round(expected))
        expected = max(1.0, expected * math.exp(2 * (0.5 - rate)))
