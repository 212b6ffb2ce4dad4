"""OpenRLHF's PPO trainer as the controller of a distillation run."""

from __future__ import annotations

import time
from operator import attrgetter
from pathlib import Path
from typing import Any

import ray
import torch
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_trainer import PPOTrainer
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin import trust
from skd_plugin.config.host_rules import NO_REWARD, check_number, planned_steps
from skd_plugin.config.schema import Coefficients, SKDConfig
from skd_plugin.core.layout import first_response_place
from skd_plugin.core.metrics import rollout_metrics
from skd_plugin.core.rng import derive_seed
from skd_plugin.engine.arguments import EngineDescription
from skd_plugin.engine.sampling_rule import RulePlan
from skd_plugin.host import by_task
from skd_plugin.host.batch import trace_of
from skd_plugin.host.evaluation import HeldOut
from skd_plugin.host.metrics import objective_metrics
from skd_plugin.host.run_prompts import RunPrompts
from skd_plugin.host.samples import RewardFreeExperienceMaker, SKDExperienceMaker, SKDSamplesGenerator
from skd_plugin.host.teacher_check import compare_teachers
from skd_plugin.run_folder import RunFolder
from skd_plugin.seams import plain_class, rebind
from skd_plugin.tasks import reward

HostTrainer = plain_class(PPOTrainer)

RULE_STATE = "skd_rule"  # key in OpenRLHF's checkpoint of what a controller has learned
STEP_METRICS = "skd_metrics"  # key in the status of a training step, on its way to the loggers


def expected_parts(skd: SKDConfig) -> dict[str, dict[str, str | int | float]]:
    """What engines and policy actors must say of themselves (`describe_skd`)."""
    return {
        "engine": {
            "sampler": "SKDSampler",
            "drafter": "SKDDrafter",
            # What the engine records and what the loss reads of it must be of one temperature and width.
            "loss_temperature": skd.loss.temperature,
            "teacher_top_k": skd.loss.teacher_top_k,
        },
        "policy": {"trainer": "SKDActorTrainer", "loss": "Objective", "batches": "OptimizerStepBatches"},
    }


class SKDTrainer(HostTrainer):
    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        trust.close_transformers()
        torch.manual_seed(strategy.args.train.seed)  # OpenRLHF's prompt loader shuffles by a number drawn from it
        rebind(ppo_trainer, "PromptDataset", RunPrompts)  # its prepare_datasets names it
        super().__init__(pretrain, strategy, *args, **kwargs)
        options = strategy.args
        self.skd: SKDConfig = options.skd
        self.folder = RunFolder(Path(self.skd.run_dir))
        prompts = self.prompts_dataloader.dataset
        names = ("data.max_samples", "rollout.batch_size")
        check_number(len(prompts), {name: attrgetter(name)(options) for name in names})  # now of any dataset
        self.planned_steps = planned_steps(len(prompts), options.rollout.batch_size, options.train.num_episodes)
        self.plan = RulePlan(self.skd.rollout, self.planned_steps, len(self.tokenizer))
        self.samples_generator = SKDSamplesGenerator(
            strategy,
            self.prompts_dataloader,
            self.eval_dataloader,
            self.tokenizer,
            self.vllm_engines,
            plan=self.plan,
            seed=self.skd.rollout.seed,
        )
        maker = SKDExperienceMaker if self.skd.objective.uses_rewards else RewardFreeExperienceMaker
        self.experience_maker = maker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            strategy,
            self.tokenizer,
        )
        self._sources = by_task.sources(prompts, self.eval_dataloader.dataset if self.eval_dataloader else None)
        self._several_tasks = len(set(prompts.datasources)) > 1
        self._held_out = HeldOut(
            self.samples_generator,
            {**self.generate_kwargs, "n_samples_per_prompt": options.eval.n_samples_per_prompt},
            self._task_of,
            by_checker=options.reward.remote_url == [reward.__file__],
        )
        self._evaluated_step: int | None = None
        self._teacher_gap: float | None = None  # of its log-probs, see compare_teachers; None before the first step

    @property
    def _step(self) -> int:
        """Training steps that are finished."""
        return self.samples_generator.step

    def fit(self, global_step: int = 0) -> None:
        self._check_parts()
        states = self.init_checkpoint_states()
        self.samples_generator.step = states["global_step"]
        self.plan.load_state_dict(states.get(RULE_STATE, self.plan.state_dict()))
        if self.eval_dataloader is not None:
            self._measure_before_training()
        self.folder.status.stage("training", planned_steps=self.planned_steps)
        super().fit(global_step)
        if not self._step:
            raise RuntimeError(
                "the run came to its end without a training step: openrlhf.algo.dynamic_filtering_range left too few "
                "prompts for one; widen it, or give more prompts"
            )
        if self.eval_dataloader is not None and self._evaluated_step != self._step:
            self.evaluate(self._step)
        self.folder.status.stage("saving")

    def _measure_before_training(self) -> None:
        """What a resumed run has measured already is not measured again; what it was killed before, is."""
        evaluations = [(r["step"], key) for r in self.folder.metrics.read() for key in r if key.startswith("eval/")]
        scored = self.args.reward.remote_url != [NO_REWARD]
        if self.skd.eval.teacher and scored and not any("/teacher_" in key for _, key in evaluations):
            self.folder.status.stage("measuring the teacher")
            self._log_eval(0, self._held_out.measure_teacher(self.plan.at(0).teacher_only(0.0)))
        done = any(step == self._step and "/teacher_" not in key for step, key in evaluations)
        if self._step:
            self._evaluated_step = self._step if done else None
            due = self._step % self.args.eval.steps == 0
        else:
            due = self.skd.eval.at_start
        if due and not done:
            self.folder.status.stage("measuring the student")
            if self._step:
                self.broadcast_to_vllm()  # the engine still has the student of the beginning
            self.evaluate(self._step)

    def _check_parts(self) -> None:
        """Raises RuntimeError unless every engine and every policy actor really runs SKD's parts."""
        engines = ray.get([engine.describe_skd.remote() for engine in self.vllm_engines])
        policies = ray.get(self.actor_model_group.async_run_method("describe_skd"))
        expected = expected_parts(self.skd)
        for kind, found in [("engine", d) for d in engines] + [("policy", d) for d in policies]:
            for part, wanted in expected[kind].items():
                if found.get(part) != wanted:
                    raise RuntimeError(
                        f"the {part} of one {kind} actor is {found.get(part)}, expected {wanted}: SKD is not active "
                        "there. Another plugin or a newer OpenRLHF replaced it; run pytest tests/contract."
                    )
        print(f"SKD is active: {engines[0]}")

    def train_step(self, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        """OpenRLHF's step; its status also carries what is measured of it here, on its way to the loggers."""
        started = time.monotonic()
        draft_len = self.skd.rollout.draft_len
        traces = [trace_of(sample) for sample in rollout_samples]
        metrics = rollout_metrics(traces, draft_len) | self.samples_generator.rule.metrics()
        if self._several_tasks:
            names = [self._task_of(sample) for sample in rollout_samples]
            metrics |= by_task.rollout_by_task(traces, names, draft_len)
        self._record_traces(rollout_samples, global_step + 1)
        if self._teacher_gap is None and self.skd.teacher.compare:
            self._teacher_gap = metrics["skd/teacher_gap"] = self._compare_teachers(rollout_samples)
        coefficients = self._begin_step(global_step)
        status, step = super().train_step(rollout_samples, global_step)
        self.plan.observe(metrics.get("skd/accept_rate", float("nan")))
        self.samples_generator.step = step
        metrics |= objective_metrics(status, traces, coefficients)
        metrics["time/train"] = time.monotonic() - started
        metrics["tokens"] = sum(map(len, traces))
        return {**status, STEP_METRICS: metrics}, step

    def _compare_teachers(self, samples: list[Experience]) -> float:
        engine: EngineDescription = ray.get(self.vllm_engines[0].describe_skd.remote())
        return compare_teachers(samples, engine, quantised=engine["quantization"] is not None)

    def _begin_step(self, global_step: int) -> Coefficients:
        progress = min(global_step / max(self.planned_steps, 1), 1.0)
        coefficients = self.skd.objective.coefficients(progress)
        seed = derive_seed(self.args.train.seed, global_step) % 2**63
        ray.get(self.actor_model_group.async_run_method("begin_step", global_step + 1, coefficients, seed))
        return coefficients

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        """Adds what SKD measured to what OpenRLHF's loggers get, and writes the step's line of metrics.jsonl."""
        status = dict(logs_dict or {})
        metrics = status.pop(STEP_METRICS)
        tokens, generation = metrics.pop("tokens"), status.get("timing/generation", 0.0)
        metrics |= {
            "time/rollout": generation,
            "time/sync": status.get("timing/broadcast"),
            "time/step": generation + metrics["time/train"],
            "grad_norm": status.get("actor_grad_norm") or None,  # DeepSpeed keeps none in float32
            "lr": status.get("actor_lr"),
        }
        metrics["tokens_per_s"] = tokens / metrics["time/step"] if metrics["time/step"] else None
        passed = status.get("dynamic_filtering_pass_rate")
        if passed is not None:  # OpenRLHF counts samples for prompts, and comes to it after the training step
            metrics["rl/filter_pass_rate"] = passed / self.args.rollout.n_samples_per_prompt / 100
        # Before the checkpoint is written: a run that is resumed from it has this line.
        self.folder.metrics.append({"step": global_step, **metrics})
        states = {**(client_states or {}), RULE_STATE: self.plan.state_dict()}
        super().save_logs_and_checkpoints(global_step, {**status, **metrics}, states)

    def evaluate(self, global_step: int, **generate_kwargs: Any) -> dict[str, float]:
        """The student alone on the held-out prompts, by OpenRLHF's eval options; the teacher only looks on."""
        self._evaluated_step = global_step
        rule = self.plan.at(0).student_only(self.args.eval.temperature)
        return self._log_eval(global_step, self._held_out.measure_student(rule))

    def _log_eval(self, global_step: int, metrics: dict[str, float]) -> dict[str, float]:
        for logger in (self.wandb_logger, self.tensorboard_logger):
            if logger:  # it puts the prefix back
                logger.log_eval(global_step, {k.removeprefix("eval/"): v for k, v in metrics.items()})
        own = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        self.folder.metrics.append({"step": global_step, **own})
        return metrics

    def _task_of(self, sample: Experience) -> str:
        return self._sources.get(sample.prompts[0], by_task.HELD_OUT)

    def _record_traces(self, samples: list[Experience], step: int) -> None:
        """Some of a step's responses for traces.jsonl, evenly spread: they come in the order of their end, so that the
        first ones are the short ones.
        """
        count = self.skd.traces_per_step
        for sample in samples[:: max(1, len(samples) // count)][:count] if count else ():
            trace = trace_of(sample)
            prompt_ids = sample.sequences[0, : first_response_place(sample.action_mask[0])].tolist()
            self.folder.traces.append(
                {
                    "step": step,
                    **trace.to_json(prompt_ids, "length" if bool(sample.truncated) else "stop"),
                    "prompt": sample.prompts[0],
                    "response": self.samples_generator.text(trace),
                }
            )
