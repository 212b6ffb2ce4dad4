"""OpenRLHF's PPO trainer as the controller of a distillation run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_trainer import PPOTrainer, compute_eval_metrics
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.config.host_rules import NO_REWARD, planned_steps
from skd_plugin.config.schema import Coefficients, SKDConfig
from skd_plugin.core.layout import first_response_place
from skd_plugin.core.metrics import mean_kl, rollout_metrics
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Trace
from skd_plugin.engine.sampling_rule import RulePlan, SamplingRule
from skd_plugin.host import by_task
from skd_plugin.host.batch import TRACE_KEY
from skd_plugin.host.metrics import objective_metrics
from skd_plugin.host.samples import RewardFreeExperienceMaker, SKDExperienceMaker, SKDSamplesGenerator
from skd_plugin.run_folder import RunFolder
from skd_plugin.seams import plain_class
from skd_plugin.tasks import reward

HostTrainer = plain_class(PPOTrainer)

RULE_STATE = "skd_rule"  # key in the host's checkpoint of what a controller has learned
EXPECTED_PARTS = {
    "engine": {"sampler": "SKDSampler", "drafter": "SKDDrafter"},
    "policy": {"trainer": "SKDActorTrainer", "loss": "Objective", "batches": "OptimizerStepBatches"},
}


def _spread(samples: list[Experience], count: int) -> list[Experience]:
    """`count` of them, evenly spread: they come in the order of their end, so the first ones are the short ones."""
    return samples[:: max(1, len(samples) // count)][:count] if count else []


class SKDTrainer(HostTrainer):
    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(strategy.args.train.seed)  # the host's prompt loader shuffles by a number drawn from it
        super().__init__(pretrain, strategy, *args, **kwargs)
        self.skd: SKDConfig = strategy.args.skd
        args = strategy.args
        prompts = len(self.prompts_dataloader.dataset)
        self.planned_steps = planned_steps(prompts, args.rollout.batch_size, args.train.num_episodes)
        self.plan = RulePlan(self.skd.rollout, self.planned_steps, len(self.tokenizer))
        self.rule = self.plan.at(0)
        self.samples_generator = SKDSamplesGenerator(
            strategy,
            self.prompts_dataloader,
            self.eval_dataloader,
            self.tokenizer,
            self.vllm_engines,
            rule=self.rule,
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
        self.folder = RunFolder(Path(self.skd.run_dir))
        self._scored = strategy.args.reward.remote_url != [NO_REWARD]
        self._by_checker = strategy.args.reward.remote_url == [reward.__file__]
        self._task_of = by_task.sources(
            self.prompts_dataloader.dataset, self.eval_dataloader.dataset if self.eval_dataloader else None
        )
        self._several_tasks = len(set(self.prompts_dataloader.dataset.datasources)) > 1
        self._evaluated_step: int | None = None
        self._rollout_figures: dict[str, float] = {}

    def fit(self, global_step: int = 0) -> None:
        self._check_parts()
        states = self.init_checkpoint_states()
        self._step = self.samples_generator.step = states["global_step"]
        self.plan.load_state_dict(states.get(RULE_STATE, self.plan.state_dict()))
        self.samples_generator.rule = self.plan.at(self._step)
        if self.eval_dataloader is not None:
            self._measure_before_training()
        self.folder.status.stage("training", planned_steps=self.planned_steps)
        super().fit(global_step)
        if self.eval_dataloader is not None and self._evaluated_step != self._step:
            self.evaluate(self._step)
        self.folder.status.stage("saving")

    def _measure_before_training(self) -> None:
        """What a resumed run has measured already is not measured again; what it was killed before, is."""
        evaluations = [(r["step"], key) for r in self.folder.metrics.read() for key in r if key.startswith("eval/")]
        if self.skd.eval.teacher and self._scored and not any("/teacher_" in key for _, key in evaluations):
            self.folder.status.stage("measuring the teacher")
            self._log_eval(0, self._evaluate_rule(self.rule.teacher_only(0.0), "teacher_"))
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
        for kind, found in [("engine", d) for d in engines] + [("policy", d) for d in policies]:
            for part, name in EXPECTED_PARTS[kind].items():
                if found.get(part) != name:
                    raise RuntimeError(
                        f"the {part} of a {kind} actor is {found.get(part)}, expected {name}: SKD is not active "
                        "there. Another plugin or a newer host replaced it; run pytest tests/contract."
                    )
        print(f"SKD is active: {engines[0]}")

    def train_step(self, rollout_samples: list[Experience], global_step: int) -> tuple[dict[str, Any], int]:
        started = time.monotonic()
        traces = [sample.info[TRACE_KEY][0] for sample in rollout_samples]
        self._rollout_figures = (
            rollout_metrics(traces, self.skd.rollout.draft_len) | self.samples_generator.rule.figures()
        )
        if self._several_tasks:
            names = self._tasks_of(rollout_samples)
            self._rollout_figures |= by_task.rollout_by_task(traces, names, self.skd.rollout.draft_len)
        for sample in _spread(rollout_samples, self.skd.traces_per_step):
            self.folder.traces.append({"step": global_step + 1, **self._trace_record(sample)})
        coefficients = self._begin_step(global_step)
        status, step = super().train_step(rollout_samples, global_step)
        self._step = self.samples_generator.step = step
        self.plan.observe(self._rollout_figures.get("skd/accept_rate", float("nan")))
        self.samples_generator.rule = self.plan.at(step)
        self._rollout_figures |= objective_metrics(status, traces, coefficients)
        self._rollout_figures["time/train"] = time.monotonic() - started
        self._rollout_figures["tokens"] = sum(len(trace) for trace in traces)
        return status, step

    def _begin_step(self, global_step: int) -> Coefficients:
        progress = min(global_step / max(self.planned_steps, 1), 1.0)
        coefficients = self.skd.objective.coefficients(progress)
        seed = derive_seed(self.args.train.seed, global_step) % 2**63
        ray.get(self.actor_model_group.async_run_method("begin_step", coefficients, seed))
        return coefficients

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: Any = None, client_states: Any = None) -> None:
        """Adds the figures of SKD to what the host's loggers get, and writes the step's line of metrics.jsonl."""
        status = dict(logs_dict or {})
        generation = status.get("timing/generation", 0.0)
        tokens = self._rollout_figures.pop("tokens", 0)
        figures = {
            **self._rollout_figures,
            "time/rollout": generation,
            "time/sync": status.get("timing/broadcast"),
            "time/step": generation + self._rollout_figures.get("time/train", 0.0),
            "grad_norm": status.get("actor_grad_norm") or None,  # DeepSpeed keeps none in float32
            "lr": status.get("actor_lr"),
        }
        figures["tokens_per_s"] = tokens / figures["time/step"] if figures["time/step"] else None
        passed = status.get("dynamic_filtering_pass_rate")
        if passed is not None:  # the host counts samples for prompts, and comes to it behind the training step
            figures["rl/filter_pass_rate"] = passed / self.args.rollout.n_samples_per_prompt / 100
        # Before the checkpoint is written: a run that is resumed from it has this line.
        self.folder.metrics.append({"step": global_step, **figures})
        states = {**(client_states or {}), RULE_STATE: self.plan.state_dict()}
        super().save_logs_and_checkpoints(global_step, {**status, **figures}, states)

    @torch.no_grad()
    def evaluate(self, global_step: int, **generate_kwargs: Any) -> dict[str, float]:
        """The student alone on the held-out prompts, by the host's eval options; the teacher only looks on."""
        self._evaluated_step = global_step
        return self._log_eval(global_step, self._evaluate_rule(self.rule.student_only(self.args.eval.temperature)))

    def _evaluate_rule(self, rule: SamplingRule, prefix: str = "") -> dict[str, float]:
        num_samples = self.args.eval.n_samples_per_prompt
        samples = self.samples_generator.generate_eval_samples(
            rule=rule, **{**self.generate_kwargs, "n_samples_per_prompt": num_samples}
        )
        logs: dict[str, float] = {}
        if samples[0].rewards is not None and not prefix:
            logs |= compute_eval_metrics(self.eval_dataloader, samples, num_samples)
        for task, group in by_task.grouped(samples, self._tasks_of(samples)).items():
            figures = self._task_figures(group, with_kl=not prefix)
            logs |= {f"eval/{task}/{prefix}{name}": value for name, value in figures.items()}
        return logs

    def _tasks_of(self, samples: list[Experience]) -> list[str]:
        return [self._task_of.get(sample.prompts[0], by_task.HELD_OUT) for sample in samples]

    def _task_figures(self, samples: list[Experience], *, with_kl: bool) -> dict[str, float]:
        """Of the held-out responses of one task."""
        traces = [sample.info[TRACE_KEY][0] for sample in samples]
        figures: dict[str, float] = {}
        if samples[0].rewards is not None:
            rewards = torch.cat([sample.rewards for sample in samples]).float().tolist()
            responses = [self._text(trace) for trace in traces]
            labels = [sample.labels[0] for sample in samples]
            figures |= by_task.scores(rewards, responses, labels, by_checker=self._by_checker)
        if with_kl:
            figures["kl"] = mean_kl(traces)
        figures["response_len"] = sum(map(len, traces)) / len(traces)
        return figures

    def _text(self, trace: Trace) -> str:
        return self.tokenizer.decode(trace.response_ids.tolist(), skip_special_tokens=True)

    def _log_eval(self, global_step: int, logs: dict[str, float]) -> dict[str, float]:
        for logger in (self.wandb_logger, self.tensorboard_logger):
            if logger:
                logger.log_eval(global_step, {k.removeprefix("eval/"): v for k, v in logs.items()})  # it puts one back
        self.folder.metrics.append({"step": global_step, **{k: v for k, v in logs.items() if k.startswith("eval/")}})
        return logs

    def _trace_record(self, sample: Experience) -> dict[str, Any]:
        trace = sample.info[TRACE_KEY][0]
        finish = "length" if bool(sample.truncated) else "stop"
        prompt_ids = sample.sequences[0, : first_response_place(sample.action_mask[0])].tolist()
        return {
            **trace.to_json(prompt_ids, finish),
            "prompt": sample.prompts[0],
            "response": self._text(trace),
        }
