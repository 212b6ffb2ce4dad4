"""A recipe file of a test's own, and a small run of the quickstart."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_plugin.config.run import Run
from skd_plugin.prepare.load_run import load_run
from tests.recipes import QUICKSTART, SMALL


@pytest.fixture(autouse=True)
def on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def write(tmp_path: Path):
    """`write(name, text)`: a recipe file; returns its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


@pytest.fixture
def quickstart(tmp_path: Path):
    """`quickstart(*overrides)`: load_run of the quickstart with a small task, in one and the same run folder."""

    def load(*overrides: str) -> Run:
        return load_run(QUICKSTART, [*SMALL, f"skd.run_dir={tmp_path / 'run'}", *overrides])

    return load
