"""The hosts can be imported on a machine without CUDA only after `host.on_cpu.install`."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def importable_hosts() -> None:
    from skd_plugin.host import on_cpu

    on_cpu.install()
