"""What is measured on the held-out prompts while a run goes on, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from openrlhf.trainer.ppo_trainer import compute_eval_metrics
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.config.host_rules import NO_REWARD
from skd_plugin.core.layout import ResponseLayout
from skd_plugin.core.metrics import metric_of
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.host import by_task
from skd_plugin.host.run_samples import RunSamples
from skd_plugin.host.trace_store import stored_trace
from skd_plugin.run_folder import RunFolder
from skd_plugin.tasks import reward


class HeldOut:
    """The held-out prompts, and how responses to them are sampled and scored. A line of metrics.jsonl each time."""

    def __init__(self, samples: RunSamples, generate_kwargs: dict[str, Any]) -> None:
        """`generate_kwargs`: OpenRLHF's, of training."""
        self._generator = samples
        self._args = samples.args
        self._generate_kwargs = {**generate_kwargs, "n_samples_per_prompt": self._args.eval.n_samples_per_prompt}
        self._by_checker = self._args.reward.remote_url == [reward.__file__]
        self._folder = RunFolder(Path(self._args.skd.run_dir))
        self.evaluated_step: int | None = None  # the latest

    def measure_before_training(self, step: int, load_student: Callable[[], None]) -> dict[str, float]:
        """What a resumed run has measured already is not measured again; what it was killed before, is.

        Args:
            step: from which the run goes on.
            load_student: gives the engines the student of that step, in place of that of the beginning.
        """
        metrics: dict[str, float] = {}
        if self._generator.eval_dataloader is None:
            return metrics
        evaluations = [(r["step"], key) for r in self._folder.metrics.read() for key in r if key.startswith("eval/")]
        scored = self._args.reward.remote_url != [NO_REWARD]
        if self._args.skd.eval.teacher and scored and not any("/teacher_" in key for _, key in evaluations):
            self._folder.status.stage("measuring the teacher")
            metrics |= self.measure_teacher()
        done = any(of == step and "/teacher_" not in key for of, key in evaluations)
        if step:
            self.evaluated_step = step if done else None
            due = step % self._args.eval.steps == 0
        else:
            due = self._args.skd.eval.at_start
        if due and not done:
            self._folder.status.stage("measuring the student")
            if step:
                load_student()
            metrics |= self.measure_student(step)
        return metrics

    def measure_after_training(self, step: int) -> dict[str, float]:
        """Of the last step's student, unless it has been measured; there may be no step."""
        if self._generator.eval_dataloader is None or self.evaluated_step == step or not step:
            return {}
        return self.measure_student(step)

    def measure_student(self, step: int) -> dict[str, float]:
        """The student of a step alone, by OpenRLHF's eval options; the teacher only looks on: `eval/<task>/...`,
        beside what OpenRLHF makes of the rewards.
        """
        self.evaluated_step = step
        samples = self._samples(self._generator.plan.at(0).student_only(self._args.eval.temperature))
        of_openrlhf: dict[str, float] = {}
        if samples[0].rewards is not None:
            num_samples = self._generate_kwargs["n_samples_per_prompt"]
            of_openrlhf = compute_eval_metrics(self._generator.eval_dataloader, samples, num_samples)
        return {**of_openrlhf, **self._written(step, self._by_task(samples, "", with_kl=True))}

    def measure_teacher(self) -> dict[str, float]:
        """`eval/<task>/teacher_...`."""
        samples = self._samples(self._generator.plan.at(0).teacher_only(0.0))
        return self._written(0, self._by_task(samples, "teacher_", with_kl=False))

    def _written(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        self._folder.metrics.append({"step": step, **metrics})
        return metrics

    @torch.no_grad()
    def _samples(self, rule: SamplingRule) -> list[Experience]:
        return self._generator.generate_eval_samples(rule=rule, **self._generate_kwargs)

    def _by_task(self, samples: list[Experience], prefix: str, *, with_kl: bool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for task, group in by_task.grouped(samples, [self._generator.task_of(sample) for sample in samples]).items():
            traces = [stored_trace(sample) for sample in group]
            measured: dict[str, float] = {}
            if group[0].rewards is not None:
                rewards = torch.cat([sample.rewards for sample in group]).float().tolist()
                responses = [self._generator.text(_response_ids(sample), sample.prompts[0]) for sample in group]
                labels = [sample.labels[0] for sample in group]
                measured |= by_task.scores(rewards, responses, labels, by_checker=self._by_checker)
            if with_kl:
                measured["kl"] = metric_of("skd/kl", [trace.figures for trace in traces])
            measured["response_len"] = sum(map(len, traces)) / len(traces)
            metrics |= {f"eval/{task}/{prefix}{name}": value for name, value in measured.items()}
        return metrics


def _response_ids(sample: Experience) -> list[int]:
    return ResponseLayout.of(sample.action_mask).tokens(sample.sequences).tolist()
