"""A run in a Ray job uses the cluster that the job is in: a real cluster, and the arguments of a run on GPUs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import GUARD_S, wait_for

pytestmark = pytest.mark.e2e

RAY = str(Path(sys.executable).with_name("ray"))
JOB = """
import os
from types import SimpleNamespace

import ray

from skd_plugin.host import on_cpu

on_cpu.install()  # without a GPU the host's imports need it
from skd_plugin.host.bind import ray_options

ray.init(**ray_options(SimpleNamespace(cpu=False), own_ray=False))


@ray.remote
def seen():
    return [os.environ.get(name) for name in ("OF_THE_JOB", "TOKENIZERS_PARALLELISM")]


print("RESULT", ray.cluster_resources().get("mark"), *ray.get(seen.remote()))
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """The dashboard's address of a cluster of one node, which has a resource by which it is known."""
    folder = tempfile.mkdtemp(dir="/tmp", prefix="ray")  # tmp_path is too long for the name of a socket
    port, dashboard, agent = free_ports(3)
    head = ["start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    own = [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", '--resources={"mark": 7}']
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [RAY, *head, *own, "--disable-usage-stats"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{dashboard}"
    process.terminate()
    process.wait(GUARD_S)
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def submit(address: str, script: Path) -> subprocess.CompletedProcess[str]:
    """Again and again until the cluster takes jobs, which is a while after its dashboard answers."""
    environment = json.dumps({"env_vars": {"OF_THE_JOB": "yes"}})
    command = [RAY, "job", "submit", f"--address={address}", f"--runtime-env-json={environment}"]

    def accepted() -> subprocess.CompletedProcess[str] | None:
        done = subprocess.run([*command, "--", sys.executable, str(script)], capture_output=True, text=True)
        return done if "submitted successfully" in done.stdout else None

    return wait_for(accepted, "a job that the cluster takes", poll_s=1.0)


def test_a_job_uses_its_cluster(tmp_path: Path, cluster: str) -> None:
    """Neither a Ray of its own nor a conflict between the environments of the job and of the run."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    done = submit(cluster, script)
    assert "RESULT 7.0 yes true" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
