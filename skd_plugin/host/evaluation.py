"""What is measured on the held-out prompts while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from openrlhf.trainer.ppo_trainer import compute_eval_metrics
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.core.metrics import mean_kl
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.host import by_task
from skd_plugin.host.batch import trace_of
from skd_plugin.host.samples import SKDSamplesGenerator


class HeldOut:
    """The held-out prompts, and how responses to them are sampled and scored."""

    def __init__(
        self,
        generator: SKDSamplesGenerator,
        generate_kwargs: dict[str, Any],
        task_of: Callable[[Experience], str],
        *,
        by_checker: bool,
    ) -> None:
        """
        Args:
            generate_kwargs: OpenRLHF's, with the number of samples a prompt of an evaluation.
            task_of: name of the task of a response.
            by_checker: rewards are the scores of the tasks' own checkers.
        """
        self._generator = generator
        self._generate_kwargs = generate_kwargs
        self._task_of = task_of
        self._by_checker = by_checker

    def measure_student(self, rule: SamplingRule) -> dict[str, float]:
        """`eval/<task>/...` of the student alone, beside what OpenRLHF makes of the rewards."""
        samples = self._samples(rule)
        of_openrlhf: dict[str, float] = {}
        if samples[0].rewards is not None:
            num_samples = self._generate_kwargs["n_samples_per_prompt"]
            of_openrlhf = compute_eval_metrics(self._generator.eval_dataloader, samples, num_samples)
        return {**of_openrlhf, **self._by_task(samples, "", with_kl=True)}

    def measure_teacher(self, rule: SamplingRule) -> dict[str, float]:
        """`eval/<task>/teacher_...`."""
        return self._by_task(self._samples(rule), "teacher_", with_kl=False)

    @torch.no_grad()
    def _samples(self, rule: SamplingRule) -> list[Experience]:
        return self._generator.generate_eval_samples(rule=rule, **self._generate_kwargs)

    def _by_task(self, samples: list[Experience], prefix: str, *, with_kl: bool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for task, group in by_task.grouped(samples, [self._task_of(sample) for sample in samples]).items():
            traces = [trace_of(sample) for sample in group]
            measured: dict[str, float] = {}
            if group[0].rewards is not None:
                rewards = torch.cat([sample.rewards for sample in group]).float().tolist()
                responses = [self._generator.text(trace) for trace in traces]
                labels = [sample.labels[0] for sample in group]
                measured |= by_task.scores(rewards, responses, labels, by_checker=self._by_checker)
            if with_kl:
                measured["kl"] = mean_kl(traces)
            measured["response_len"] = sum(map(len, traces)) / len(traces)
            metrics |= {f"eval/{task}/{prefix}{name}": value for name, value in measured.items()}
        return metrics
