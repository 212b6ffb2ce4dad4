"""OpenRLHF's asynchronous trainer: responses are sampled for the next step while this one trains.

Two actors with a queue between them. What is sampled carries what was measured of it, the state of the rule, and the
version of the student that proposed each token (`Trace.student_version`); a step may train on the tokens of a student
that is `train.async_queue_size` updates old, and no older. With `train.partial_rollout_enable` the engines do not wait
for their responses to end before they take new weights: what was begun by one student is gone on with by the next.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from openrlhf.trainer import ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.core.clock import Clock
from skd_plugin.core.metrics import Ratio
from skd_plugin.host.controller import prepare_process
from skd_plugin.host.evaluation import HeldOut
from skd_plugin.host.run_samples import RunSamples
from skd_plugin.host.trace_store import stored_trace
from skd_plugin.host.training_side import RULE_STATE, STEP_METRICS, TrainingSide
from skd_plugin.run_folder import RunFolder
from skd_plugin.seams import plain_class, rebind

SAMPLED = "skd_sampled"  # entry of the client states that travel through the queue beside the samples

HostAsyncTrainer = plain_class(ppo_trainer_async.PPOTrainerAsync)
HostGenerator = plain_class(ppo_trainer_async.GenerateSamplesActor)
HostTrainingActor = plain_class(ppo_trainer_async.TrainingActor)


class Tapped:
    """OpenRLHF's queue of rollouts, with a look at what goes through.

    In it are references. The actor that is the queue would read and write each batch, and import for the first one all
    that this process has, which holds up the first step by ten seconds.
    """

    def __init__(self, queue: Any, look: Callable[[Any], None]) -> None:
        self._queue, self._look = queue, look

    def put(self, payload: Any, **kwargs: Any) -> None:
        self._look(payload)
        self._queue.put([ray.put(payload)], **kwargs)  # Ray would fetch what is no list

    def get(self, **kwargs: Any) -> Any:
        (reference,) = self._queue.get(**kwargs)
        payload = ray.get(reference)
        self._look(payload)
        return payload


def is_batch(payload: Any) -> bool:
    """Whether it is (samples, client states, pass rate, seconds), and not an evaluation or the end."""
    return payload != "done" and payload[0] != "eval"


class SKDGenerator(HostGenerator):
    """The sampling side, in an actor of its own."""

    def __init__(self, pretrain: str, strategy: Any, *args: Any, rollout_queue: Any, **kwargs: Any) -> None:
        prepare_process(strategy.args)
        rebind(ppo_trainer_async, "SamplesGenerator", RunSamples)
        super().__init__(pretrain, strategy, *args, rollout_queue=Tapped(rollout_queue, self._add_sampled), **kwargs)
        self._held_out = HeldOut(self.samples_generator, self.generate_kwargs)

    def _add_sampled(self, payload: Any) -> None:
        if is_batch(payload):
            payload[1][SAMPLED] = self.samples_generator.take_sampled()

    def planned_steps(self) -> int:
        return self.samples_generator.planned_steps

    def resume(self, step: int, rule_state: dict[str, float] | None) -> dict[str, float]:
        """Goes on behind a step, whose student the engines have; returns what is measured before."""
        self.samples_generator.resume(step, rule_state)
        return self._held_out.measure_before_training(step, lambda: None)

    def _run_eval(self) -> dict[str, float]:
        """OpenRLHF's `fit` asks for it while the engines keep their student."""
        return _without_prefix(self._held_out.measure_student(self._student_version()))

    def measure_after_training(self, step: int) -> dict[str, float]:
        return self._held_out.measure_after_training(step)

    def _student_version(self) -> int:
        """Of the student that the engines have: it may be newer than the step that OpenRLHF's slot speaks of."""
        return ray.get(self.samples_generator.vllm_engines[0].student_version.remote())


class SKDTrainingActor(TrainingSide, HostTrainingActor):
    """The training side, in an actor of its own."""

    def __init__(self, pretrain: str, strategy: Any, *args: Any, rollout_queue: Any, **kwargs: Any) -> None:
        prepare_process(strategy.args)
        super().__init__(pretrain, strategy, *args, rollout_queue=Tapped(rollout_queue, self._take_sampled), **kwargs)

    def _take_sampled(self, payload: Any) -> None:
        if is_batch(payload):
            self.sampled = payload[1].pop(SAMPLED)
        else:
            self.clock.lap()  # the time of an evaluation is not the next step's

    def begin(self, planned_steps: int) -> dict[str, Any]:
        """Before all else; returns the states of the checkpoint to go on from."""
        self.set_up(planned_steps, Clock())
        states = self.resume()
        self._step = states["global_step"]
        if self._step:
            self.broadcast_to_vllm()
        return states

    def train_step(self, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        staleness = self._staleness(rollout_samples, global_step)
        status, self._step = super().train_step(rollout_samples, global_step)
        status[STEP_METRICS]["skd/staleness"] = staleness
        return status, self._step

    def broadcast_to_vllm(self) -> None:
        """Ray copies an actor's methods into a class of its own, and OpenRLHF's by value, so that its `super()` would
        not know this class; behind one of ours it does.
        """
        super().broadcast_to_vllm()

    def _staleness(self, samples: list[Experience], global_step: int) -> float:
        """Updates between the student that proposed a token and the one that learns from it, mean over tokens.

        Raises:
            RuntimeError: more of them than the queue has places.
        """
        versions = [stored_trace(sample).versions for sample in samples]
        oldest = global_step - min((of_one.least for of_one in versions if of_one.mean.whole), default=global_step)
        if oldest > self.args.train.async_queue_size:
            raise RuntimeError(
                f"step {global_step + 1} would train on tokens of a student that is {oldest} updates old, but "
                f"openrlhf.train.async_queue_size is {self.args.train.async_queue_size}: OpenRLHF's queue works in "
                "another way than this plugin is made for. Run pytest tests/contract"
            )
        total, tokens = Ratio.total([of_one.mean for of_one in versions])
        return global_step - total / tokens if tokens else 0.0

    def fit(self, global_step: int = 0) -> None:
        self.clock.lap()
        super().fit(global_step)

    def step_times(self) -> dict[str, float]:
        times = super().step_times()
        times["time/queue"] = times.pop("time/rest")  # whatever else this process does, it waits for responses
        return times

    def finished_steps(self) -> int:
        return self._step


class SKDAsyncTrainer(HostAsyncTrainer):
    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        rebind(ppo_trainer_async, "GenerateSamplesActor", ray.remote(SKDGenerator))
        rebind(ppo_trainer_async, "TrainingActor", ray.remote(SKDTrainingActor))
        super().__init__(pretrain, strategy, *args, **kwargs)
        self._folder = RunFolder(Path(strategy.args.skd.run_dir))

    def fit(self) -> None:
        planned_steps = ray.get(self.generator_actor.planned_steps.remote())
        states = ray.get(self.trainer_actor.begin.remote(planned_steps))
        step = states["global_step"]
        before = ray.get(self.generator_actor.resume.remote(step, states.get(RULE_STATE)))
        ray.get(self.trainer_actor.log_evaluation.remote(step, before))
        self._folder.status.stage("training", planned_steps=planned_steps)
        super().fit()
        step = ray.get(self.trainer_actor.finished_steps.remote())
        after = ray.get(self.generator_actor.measure_after_training.remote(step))
        ray.get(self.trainer_actor.end.remote(step, after))
        self._folder.status.stage("saving")


def _without_prefix(metrics: dict[str, float]) -> dict[str, float]:
    """OpenRLHF's loggers put `eval/` in front."""
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}
