"""The hosts can be imported on a machine without CUDA only after `compat.cpu.install`."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def importable_hosts() -> None:
    from skd_plugin import cpu

    cpu.install()
