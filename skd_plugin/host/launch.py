"""The process that becomes OpenRLHF: binds SKD's parts, then runs OpenRLHF's own script as `__main__`.

python -m skd_plugin.host.launch RUN_DIR
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import runpy
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from skd_plugin import cpu, trust
from skd_plugin.config.host_options import HOST_MODULE, HostOptions
from skd_plugin.config.run import Run
from skd_plugin.host import on_cpu
from skd_plugin.run_folder import RunFolder, Status
from skd_plugin.seams import rebind
from skd_plugin.tasks import reward

RAY_START_S = 90.0  # that Ray's node has to come up in; Ray gives it 30, which may be too few on a busy machine

ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], None]


def main(run_dir: str) -> None:
    end_with_the_parent()
    run = Run.load(RunFolder(Path(run_dir)))
    status = run.folder.status
    sys.excepthook = _report_to(status)
    status.stage("loading the libraries")
    own_ray = run.cpu or os.environ.get("RAY_ADDRESS") == "local"
    prepare_process(run, own_ray=own_ray)
    import ray

    from skd_plugin.host import waiting
    from skd_plugin.host.bind import bind, ray_options

    import_user_code(run.host)
    status.stage("starting Ray")
    if own_ray:
        wait_longer_for_ray()
    ray.init(**ray_options(run, own_ray=own_ray))
    bind(run)
    status.stage("starting the engine and the trainer")
    waiting.tell_while_starting(run.folder)
    run_host(run)
    status.stage("done")
    ray.shutdown()


def prepare_process(run: Run, *, own_ray: bool) -> None:
    """What this process and all those that it starts go by; before Ray or a model's library is imported."""
    trust.allow(remote_code=run.skd.trust_remote_code, pickle_weights=run.skd.pickle_weights)
    os.environ["PATH"] = own_programs_first(os.environ.get("PATH", ""))
    if run.cpu:
        os.environ.update(cpu.environment())
        on_cpu.install()
    if own_ray:
        close_ray()


def run_host(run: Run) -> None:
    """OpenRLHF's own script, with what is bound. Raises RuntimeError: it has ended, and SKD's trainer has not run."""
    sys.argv = [HOST_MODULE, *run.host_argv()]
    runpy.run_module(HOST_MODULE, run_name="__main__")
    if run.folder.status.read()["stage"] != "saving":
        raise RuntimeError("OpenRLHF came to its end without SKD's trainer: it no longer uses the names we rebind")


def close_ray() -> None:
    """Ray listens on all interfaces, and whoever reaches its port may run code here. With a token that only this run
    has, it lets nobody else in. Ray reads it when it starts, as do its daemons and workers, which inherit it.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.pop("RAY_ADDRESS", None)  # of another Ray, or "local": vLLM would look there


def wait_longer_for_ray() -> None:
    """Where this process starts a Ray of its own."""
    from ray._private import services

    look = services.get_node  # raises RuntimeError while the node is not there

    def get_node(gcs_address: str, node_id: str) -> Any:
        until = time.monotonic() + RAY_START_S
        while True:
            try:
                return look(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.5)

    rebind(services, "get_node", get_node)


def import_user_code(options: HostOptions) -> None:
    """The reward function's and the agent's file are run once here, as OpenRLHF will, before minutes of starting.

    Raises:
        RuntimeError: one of them raises an error.
    """
    for option in ("reward.remote_url", "train.agent_func_path"):
        path = str(options.get(option) or "").split(",")[0]
        if path.endswith(".py") and path != reward.__file__:
            try:
                spec = importlib.util.spec_from_file_location("user_code", path)
                assert spec is not None and spec.loader is not None
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            except Exception as error:  # whatever a file of the user's raises
                reason = f"{type(error).__name__}: {error}"
                raise RuntimeError(f"openrlhf.{option}: {path} cannot be imported: {reason}") from error


def own_programs_first(path: str) -> str:
    """PATH with this environment's programs in front, as if it were activated.

    DeepSpeed builds its operators with the `ninja` that it finds. Two versions that take turns do not know each
    other's records, and each builds everything anew: a minute and a half at the start of a run.
    """
    return os.pathsep.join([str(Path(sys.executable).parent), *([path] if path else [])])


def end_with_the_parent() -> None:
    """Should `skd` itself be killed, this process is told to end, and Ray's processes end with it (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _report_to(status: Status) -> ExceptHook:
    """An excepthook: the traceback goes to the log as ever, its last line also into the status file."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a remote call raised
        text = "".join(traceback.format_exception_only(type(cause), cause)).strip().splitlines()[-1]
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            text += ". Make room, or point skd.run_dir at another disk"
        try:
            status.stage("failed", error=text)
        except OSError as full:  # the status file is on the disk that is full; `skd train` names the log then
            print(f"could not write {status.path}: {full}", file=sys.stderr)
        sys.__excepthook__(kind, error, trace)

    return report


if __name__ == "__main__":
    main(sys.argv[1])
