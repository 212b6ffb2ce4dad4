"""What SKD adds to a training step of OpenRLHF's controllers, the synchronous and the asynchronous one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.config.objective import Coefficients
from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.teacher import ONLY
from skd_plugin.core.clock import Clock
from skd_plugin.core.rng import derive_seed
from skd_plugin.engine.arguments import EngineDescription
from skd_plugin.host import by_task
from skd_plugin.host.end_event import end_ids_of
from skd_plugin.host.garbage import keep_what_is_there, look_less_often
from skd_plugin.host.metrics import objective_metrics
from skd_plugin.host.policy_actor import SECONDS
from skd_plugin.host.run_samples import Sampled
from skd_plugin.host.samples import RewardFreeExperienceMaker, SKDExperienceMaker
from skd_plugin.host.teacher_check import compare_teachers
from skd_plugin.host.teacher_prompts import teacher_of, teachers_ids
from skd_plugin.host.trace_store import TRACE_KEY
from skd_plugin.models import load_tokenizer
from skd_plugin.run_folder import RunFolder

RULE_STATE = "skd_rule"  # key in OpenRLHF's checkpoint of what a controller has learned
# Parts of a step between its last response and its weights in the engines.
FETCHING = "fetching"  # of traces by the trainers: with the engines' part one number, `traces`
TRAINING_PARTS = frozenset(["experience", FETCHING, *"batches forward backward optimizer ray sync".split()])
STEP_METRICS = "skd_metrics"  # key in the status of a training step, on its way to the loggers


def expected_parts(skd: SKDConfig, end_ids: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What engines and policy actors must say of themselves (`describe_skd`). Args: end_ids: of `joined_ends`."""
    pair = {
        "sampler": "SKDSampler",
        "drafter": "SKDDrafter",
        # What the engine records and what the loss reads of it must be of one temperature and width.
        "loss_temperature": skd.loss.temperature,
        "teacher_top_k": skd.loss.teacher_top_k,
        "student_top_k": skd.loss.student_top_k,
        "end_ids": list(end_ids),
    }
    return {
        "engine": {"sampler": "StudentSampler", "drafter": "none"} if skd.is_served else pair,
        "policy": {
            "trainer": "SKDActorTrainer",
            "loss": "Objective",
            "batches": "OptimizerStepBatches",
            "end_ids": list(end_ids),
        },
    }


class TrainingSide:
    """Mixed into a BasePPOTrainer of OpenRLHF's, in front of it."""

    sampled: Sampled | None  # of the step that is trained

    def set_up(self: Any, planned_steps: int, clock: Clock) -> None:
        """After OpenRLHF's own __init__. Args: clock: of this process."""
        self.clock = clock
        self.skd: SKDConfig = self.args.skd
        self.folder = RunFolder(Path(self.skd.run_dir))
        self.planned_steps = planned_steps
        maker = SKDExperienceMaker if self.skd.objective.uses_rewards else RewardFreeExperienceMaker
        self.experience_maker = maker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            self.strategy,
            self.tokenizer,
        )
        self.hold_loggers()
        # Teachers whose log-probs are still to be looked at, see compare_teachers
        self._uncompared = [name for name, one in self.skd.all_teachers.items() if one.compare and not one.urls]

    def hold_loggers(self: Any) -> None:
        """OpenRLHF's fit closes them, and the last evaluation comes after it."""
        self._loggers = [logger for logger in (self.wandb_logger, self.tensorboard_logger) if logger]
        self._closings = [logger.close for logger in self._loggers]
        for logger in self._loggers:
            logger.close = lambda: None

    def check_parts(self: Any) -> None:
        """Raises RuntimeError unless every engine and every policy actor really runs SKD's parts."""
        engines = ray.get([engine.describe_skd.remote() for engine in self.vllm_engines])
        policies = ray.get(self.actor_model_group.async_run_method("describe_skd"))
        expected = expected_parts(self.skd, end_ids_of(self.args))
        names = self.skd.teachers_of_engines(len(engines))
        of_engines = [
            ("engine", said, {**expected["engine"], "teacher_place": list(self.skd.all_teachers).index(name)})
            for name, said in zip(names, engines, strict=True)
        ]
        for kind, found, parts in of_engines + [("policy", said, expected["policy"]) for said in policies]:
            for part, wanted in parts.items():
                if found.get(part) != wanted:
                    raise RuntimeError(
                        f"the {part} of one {kind} actor is {found.get(part)}, expected {wanted}: SKD is not active "
                        "there. Another plugin or a newer OpenRLHF replaced it; run pytest tests/contract."
                    )
        self._engines: dict[str, EngineDescription] = dict(zip(names, engines, strict=True))
        for engine in self._engines.values():
            print(f"SKD is active: {engine}")

    def train_step(self: Any, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        """OpenRLHF's step; its status also carries what is measured of it here, on its way to the loggers."""
        metrics = dict(self.sampled.metrics)
        metrics |= self._compare_teachers(rollout_samples, global_step)
        coefficients = self._begin_step(global_step)
        with self.clock.part("experience"):
            status, step = super().train_step(rollout_samples, global_step)
        # Popped, because OpenRLHF keeps the samples until it has the next ones, and Ray what they refer to.
        traces = [sample.info.pop(TRACE_KEY)[0] for sample in rollout_samples]
        metrics |= objective_metrics(status, [trace.drawn for trace in traces], coefficients)
        return {**status, STEP_METRICS: metrics}, step

    def ppo_train(self: Any, global_steps: int) -> dict[str, Any]:
        with self.clock.part("ray"):
            status = super().ppo_train(global_steps)
        seconds = status.pop(SECONDS, {})  # none in a step that trains the critic alone
        self.clock.split("experience", {FETCHING: seconds.pop("traces", 0.0)})
        self.clock.split("ray", seconds)
        return status

    def broadcast_to_vllm(self: Any) -> None:
        with self.clock.part("sync"):
            super().broadcast_to_vllm()

    def _compare_teachers(self: Any, samples: list[Experience], global_step: int) -> dict[str, float]:
        """Looks at each teacher in the first step that has responses of it, but at none that has moved."""
        gaps: dict[str, float] = {}
        for name in list(self._uncompared):
            own = [sample for sample in samples if teacher_of(sample.prompts[0]) == name]
            if not own:
                continue
            self._uncompared.remove(name)
            if self.skd.all_teachers[name].follow is None or not global_step:
                key = "skd/teacher_gap" if name == ONLY else f"skd/teacher_gap/{by_task.of_teacher(name)}"
                gaps[key] = self._compare_teacher(name, own)
        return gaps

    def _compare_teacher(self: Any, name: str, samples: list[Experience]) -> float:
        engine = self._engines[name]
        tokenizer = load_tokenizer(engine["teacher"], "teacher")

        def read(sample: Experience, ids: list[int]) -> list[int]:
            own = teachers_ids(sample.prompts[0], ids, self.tokenizer, tokenizer)
            return ids if own is None else own

        return compare_teachers(samples, engine, read, quantised=engine["quantization"] is not None)

    def _begin_step(self: Any, global_step: int) -> Coefficients:
        progress = min(global_step / max(self.planned_steps, 1), 1.0)
        coefficients = self.skd.objective.coefficients(progress)
        seed = derive_seed(self.args.train.seed, global_step) % 2**63
        ray.get(self.actor_model_group.async_run_method("begin_step", global_step + 1, coefficients, seed))
        return coefficients

    def resume(self: Any) -> dict[str, Any]:
        """Finds the checkpoint to go on from; returns OpenRLHF's states of it."""
        self.check_parts()
        states = self.init_checkpoint_states()
        ray.get(self.actor_model_group.async_run_method("resume", states["global_step"]))
        keep_what_is_there()
        look_less_often()
        return states

    def save_logs_and_checkpoints(
        self: Any, global_step: int, logs_dict: Any = None, client_states: Any = None
    ) -> None:
        """Adds what SKD measured to what OpenRLHF's loggers get, and writes the step's line of metrics.jsonl."""
        status = dict(logs_dict or {})
        metrics = status.pop(STEP_METRICS)
        metrics |= {
            **self.step_times(),
            "time/rollout": status.get("timing/generation", 0.0),
            "grad_norm": status.get("actor_grad_norm") or None,  # DeepSpeed keeps none in float32
            "lr": status.get("actor_lr"),
        }
        metrics["tokens_per_s"] = self.sampled.tokens / metrics["time/step"] if metrics["time/step"] else None
        passed = status.get("dynamic_filtering_pass_rate")
        if passed is not None:  # OpenRLHF counts samples for prompts, and comes to it after the training step
            metrics["rl/filter_pass_rate"] = passed / self.args.rollout.n_samples_per_prompt / 100
        with self.clock.part("save"):
            # Before the checkpoint is written: a run that is resumed from it has this line.
            self.folder.metrics.append({"step": global_step, **metrics})
            states = {**(client_states or {}), RULE_STATE: self.sampled.rule_state}
            super().save_logs_and_checkpoints(global_step, {**status, **metrics}, states)

    def step_times(self: Any) -> dict[str, float]:
        """Seconds since the last step's line, evaluations left out: of all, and of the parts, which add up to them."""
        parts = self.clock.lap()
        parts.pop("evaluation", None)
        times = {"step": sum(parts.values()), "train": sum(parts.get(name, 0.0) for name in TRAINING_PARTS)}
        fetching = parts.pop(FETCHING, 0.0)
        times |= parts | {"traces": parts.get("traces", 0.0) + fetching}
        return {f"time/{name}": seconds for name, seconds in times.items()}

    def log_evaluation(self: Any, step: int, metrics: dict[str, float]) -> None:
        for logger in self._loggers if metrics else ():  # which put the prefix back
            logger.log_eval(step, {name.removeprefix("eval/"): value for name, value in metrics.items()})

    def save_best_checkpoint(
        self: Any, eval_metrics: dict[str, float], global_step: int, client_states: Any = None
    ) -> None:
        states = {**(client_states or {}), RULE_STATE: self.sampled.rule_state}
        super().save_best_checkpoint(eval_metrics, global_step, states)

    def end(self: Any, step: int, metrics: dict[str, float]) -> None:
        """Logs the last evaluation, if there was one.

        Raises:
            RuntimeError: there was no step.
        """
        if not step:
            raise RuntimeError(
                "the run came to its end without a training step: openrlhf.algo.dynamic_filtering_range left too few "
                "prompts for one; widen it, or give more prompts"
            )
        self.log_evaluation(step, metrics)
        for close in self._closings:
            close()
