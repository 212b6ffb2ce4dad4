"""One undisturbed run, for every test that only looks at what a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.running import LONGER, finish


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, finish(folder, *LONGER)
