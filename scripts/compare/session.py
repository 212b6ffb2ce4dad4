"""Several runs, one after another, in one Ray with one engine and one policy process: `python -m session RUN_DIR...`

Each run is OpenRLHF's own script with SKD's parts, as in `skd train` (skd_plugin/host/launch.py). What a later run
finds there already is processes, and nothing in them: it reads its student anew, makes its own optimizer, schedule,
trainer and prompts, and sends its student into the engine before anything is measured or sampled. The engine keeps no
state of a run but the draft model's weights: every request carries its own rule and its own random stream.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skd_plugin.config.host_options import host_defaults
from skd_plugin.config.run import Run
from skd_plugin.engine.arguments import engine_for
from skd_plugin.host import launch
from skd_plugin.run_folder import RunFolder

SESSION = "session.json"  # in a run folder: seconds since the session began or since the run before it ended

# OpenRLHF's options of what the runs of a session share, beside those of the engine.
SHARED = (
    "vllm.num_engines",
    "actor.num_nodes",
    "actor.num_gpus_per_node",
    "reward.remote_url",
    "train.agent_func_path",
)


def engine_of(run: Run) -> dict[str, Any]:
    """What the run's engine is made of, but for vLLM's own seed: each response has a random stream of its own."""
    options = {**host_defaults(), **run.host}
    spec = engine_for(run.skd, options, student=options["actor.model_name_or_path"], cpu=run.cpu)
    own = {name: value for name, value in spec.openrlhf.items() if name != "seed"}
    shared = {name: options[name] for name in SHARED}
    return {**asdict(replace(spec, openrlhf=own)), **shared, "reward_timeout_s": run.skd.objective.reward_timeout_s}


def main(folders: list[str]) -> None:
    """Raises RuntimeError: the runs need different engines, or one of them has failed."""
    launch.end_with_the_parent()
    started = time.monotonic()
    runs = [Run.load(RunFolder(Path(folder))) for folder in folders]
    first, *later = runs
    if differ := [run.skd.run_dir for run in later if engine_of(run) != engine_of(first)]:
        raise RuntimeError(f"not the engine of {first.skd.run_dir}: {', '.join(differ)}; run them in another session")
    if later and any(run.skd.teacher.follow or run.host.get("train.async_enable") for run in runs):
        raise RuntimeError("a teacher that moves and an asynchronous run take an engine for themselves: --session 1")
    launch.prepare_process(first, own_ray=True)
    import ray

    from skd_plugin.host.bind import ray_options

    ray.init(**ray_options(first, own_ray=True))
    parts = Parts()
    for run in runs:
        status = run.folder.status
        status.stage("starting the trainer")
        parts.bind(run)
        try:
            launch.run_host(run)
        except BaseException as error:
            status.stage("failed", error=f"{type(error).__name__}: {error}".strip().splitlines()[0])
            raise
        (run.folder.path / SESSION).write_text(f"{time.monotonic() - started:.2f}")
        status.stage("done")
        started = time.monotonic()
    ray.shutdown()


class Parts:
    """What OpenRLHF's script names, with those processes kept that the first run has started."""

    def __init__(self) -> None:
        import openrlhf.trainer.ray as host_ray
        import openrlhf.trainer.ray.launcher as launcher
        import openrlhf.utils as host_utils

        self._host_ray, self._launcher, self._host_utils = host_ray, launcher, host_utils
        self._get_strategy = host_utils.get_strategy  # `bind` wraps it: once a run, not once more
        self._create_engines, self._actor_group = host_ray.create_vllm_engines, launcher.RayActorGroup
        self._engines: Any = None
        self._policy: Any = None

    def bind(self, run: Run) -> None:
        import openrlhf.trainer.ppo_trainer as ppo_trainer

        from skd_plugin.host.bind import bind
        from skd_plugin.seams import rebind

        rebind(self._host_utils, "get_strategy", self._get_strategy)
        bind(run)
        rebind(ppo_trainer, "PPOTrainer", InThisProcess(_trainer_class()))
        rebind(self._host_ray, "create_vllm_engines", self._engines_of)
        rebind(self._launcher, "RayActorGroup", self._group_of)

    def _engines_of(self, *args: Any, **kwargs: Any) -> Any:
        if self._engines is None:
            self._engines = self._create_engines(*args, **kwargs)
        return self._engines

    def _group_of(self, nodes: int, gpus: int, actor: Any, **kwargs: Any) -> Any:
        """The policy's processes are kept; those of a critic or a frozen model are of one run."""
        if actor.__ray_metadata__.class_name != "SKDPolicy":
            return self._actor_group(nodes, gpus, actor, **kwargs)
        if self._policy is None:
            self._policy = self._actor_group(nodes, gpus, actor, **kwargs)
        return self._policy


def _trainer_class() -> type:
    from skd_plugin.host.controller import SKDTrainer

    class SessionTrainer(SKDTrainer):
        def fit(self, global_step: int = 0) -> None:
            self.broadcast_to_vllm()  # the engine has the student of the run before
            super().fit(global_step)

    return SessionTrainer


class InThisProcess:
    """Stands where OpenRLHF has a class of Ray's: `.remote()` makes and asks the object here, at once."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        import ray

        if isinstance(self._made, type):
            return InThisProcess(self._made(*args, **kwargs))
        return ray.put(self._made(*args, **kwargs))

    def __getattr__(self, name: str) -> InThisProcess:
        return InThisProcess(getattr(self._made, name))


if __name__ == "__main__":
    main(sys.argv[1:])
