"""A process of an engine does not outlive its threads."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from skd_plugin.engine.set_up import ENGINE_PROCESS, end_with_its_threads


def lose_a_thread() -> None:
    """Exit status 3 where the process goes on."""

    def fail() -> None:
        raise RuntimeError("what a thread may meet")

    end_with_its_threads()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    raise SystemExit(3)


@pytest.mark.parametrize(("name", "status"), [(ENGINE_PROCESS, 1), (f"{ENGINE_PROCESS}_DP1", 1), ("other", 3)])
def test_it_ends_with_a_thread_and_no_other_process_does(name: str, status: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=lose_a_thread, name=name)
    process.start()
    process.join(60)
    assert process.exitcode == status
