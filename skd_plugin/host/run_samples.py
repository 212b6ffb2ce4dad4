"""The responses of a run, step by step: by which rule they are sampled, what they say, which of them are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import ray
from openrlhf.trainer.ppo_utils.experience import Experience

from skd_plugin.config.host_rules import check_number, planned_steps
from skd_plugin.core.clock import REST, Clock
from skd_plugin.core.layout import first_response_place
from skd_plugin.core.metrics import rollout_metrics
from skd_plugin.core.prompt_weights import PromptWeights
from skd_plugin.engine.sampling_rule import RulePlan, SamplingRule
from skd_plugin.host import by_task
from skd_plugin.host.samples import SKDSamplesGenerator
from skd_plugin.host.teacher_prompts import teacher_of, teacher_prompt
from skd_plugin.host.trace_store import PROMPT_WEIGHT, fetch, stored_trace
from skd_plugin.run_folder import RunFolder

PROMPT = "prompt/"  # before the key of a prompt, in the state


@dataclass(frozen=True)
class Sampled:
    """What the responses of a step say, and what the next ones are sampled by."""

    metrics: dict[str, float]
    tokens: int
    rule_state: dict[str, float]  # of the `RulePlan`, after it, and what is known of the prompts


class RunSamples(SKDSamplesGenerator):
    """Takes the place of OpenRLHF's SamplesGenerator in its trainers, which make it with these arguments."""

    def __init__(
        self, strategy: Any, prompts_dataloader: Any, eval_dataloader: Any, tokenizer: Any, vllm_engines: Any
    ) -> None:
        options, prompts = strategy.args, prompts_dataloader.dataset
        names = ("data.max_samples", "rollout.batch_size")
        check_number(len(prompts), {name: attrgetter(name)(options) for name in names})  # now of any dataset
        self.planned_steps = planned_steps(len(prompts), options.rollout.batch_size, options.train.num_episodes)
        super().__init__(
            strategy,
            prompts_dataloader,
            eval_dataloader,
            tokenizer,
            vllm_engines,
            plan=RulePlan(
                options.skd.rollout,
                self.planned_steps,
                len(tokenizer),
                longest=options.rollout.max_new_tokens or options.data.max_len,
            ),
            seed=options.skd.rollout.seed,
        )
        weighing = options.skd.loss.prompts
        self._prompt_weights = PromptWeights(weighing.by, weighing.floor, weighing.memory)
        self._folder = RunFolder(Path(options.skd.run_dir))
        self._sources = by_task.sources(prompts, eval_dataloader.dataset if eval_dataloader else None)
        self._several_tasks = len(set(prompts.datasources)) > 1
        self.sampled: Sampled | None = None  # of the latest step
        self.clock = Clock()  # of this process

    def resume(self, step: int, rule_state: dict[str, float] | None) -> None:
        """Goes on behind a step."""
        self.step = step
        if rule_state is not None:
            own = {name: value for name, value in rule_state.items() if not name.startswith(PROMPT)}
            self.plan.load_state_dict(own)
            scores = {name: value for name, value in rule_state.items() if name not in own}
            self._prompt_weights.load_state_dict({name.removeprefix(PROMPT): x for name, x in scores.items()})

    def task_of(self, sample: Experience) -> str:
        return self._sources.get(sample.prompts[0], by_task.HELD_OUT)

    def generate_samples(self, **generate_kwargs: Any) -> Any:
        rule = self.rule
        with self.clock.part("requests"):
            samples, *others = super().generate_samples(**generate_kwargs)
            asked = self._ask_seconds()
        if samples:
            with self.clock.part("metrics"):
                self._look_at(samples, rule)
        with self.clock.part("requests"):
            of_each = ray.get(asked)
        self.clock.split("requests", _mean_seconds(of_each))
        return samples, *others

    def generate_eval_samples(self, **kwargs: Any) -> list[Experience]:
        samples = super().generate_eval_samples(**kwargs)
        ray.get(self._ask_seconds())  # which are no step's
        return samples

    def take_sampled(self) -> Sampled:
        """What the latest step's responses say, with what this process and the engines have spent on them: of a
        process that does nothing else.
        """
        assert self.sampled is not None
        seconds = self.clock.lap()
        seconds.pop(REST)
        times = {f"time/{name}": value for name, value in seconds.items()}
        return replace(self.sampled, metrics=self.sampled.metrics | times)

    def _ask_seconds(self) -> list[ray.ObjectRef]:
        """What each engine has spent on each part of its work since the last call."""
        return [engine.take_seconds.remote() for engine in self.vllm_engines]

    def _look_at(self, samples: list[Experience], rule: SamplingRule) -> None:
        self.step += 1
        self._record(samples)
        metrics = self._metrics(samples) | rule.metrics() | self._weigh_prompts(samples)
        self.plan.observe(metrics.get("skd/accept_rate", float("nan")))
        tokens = sum(len(stored_trace(sample)) for sample in samples)
        scores = {f"{PROMPT}{key}": score for key, score in self._prompt_weights.state_dict().items()}
        self.sampled = Sampled(metrics, tokens, self.plan.state_dict() | scores)

    def _weigh_prompts(self, samples: list[Experience]) -> dict[str, float]:
        """Gives each response the weight of its prompt, if prompts are weighed."""
        if self.args.skd.loss.prompts.by == "none":
            return {}
        prompts, figures = [s.prompts[0] for s in samples], [stored_trace(s).figures for s in samples]
        rewards = [math.nan if s.rewards is None else float(s.rewards[0]) for s in samples]
        weights = self._prompt_weights.weigh(prompts, figures, rewards)
        for sample, weight in zip(samples, weights, strict=True):
            sample.info[PROMPT_WEIGHT] = [weight]
        return {"skd/prompt_weight": sum(weights) / len(weights)}

    def _metrics(self, samples: list[Experience]) -> dict[str, float]:
        figures = [stored_trace(sample).figures for sample in samples]
        metrics = rollout_metrics(figures)
        metrics["skd/truncated_frac"] = sum(bool(sample.truncated) for sample in samples) / len(samples)
        if self._several_tasks:
            metrics |= by_task.rollout_by_task(figures, [self.task_of(sample) for sample in samples])
        if self.args.skd.teachers:
            names = [by_task.of_teacher(teacher_of(sample.prompts[0])) for sample in samples]
            metrics |= by_task.rollout_by_task(figures, names)
        return metrics

    def _record(self, samples: list[Experience]) -> None:
        """Some of a step's responses for traces.jsonl, evenly spread: they come in the order of their end, so that the
        first ones are the short ones.
        """
        count = self.args.skd.traces_per_step
        for sample in samples[:: max(1, len(samples) // count)][:count] if count else ():
            (trace,) = fetch([stored_trace(sample).held])
            prompt_ids = sample.sequences[0, : first_response_place(sample.action_mask[0])].tolist()
            own = teacher_prompt(sample.prompts[0])
            self._folder.traces.append(
                {
                    "step": self.step,
                    **trace.to_json(prompt_ids, "length" if bool(sample.truncated) else "stop"),
                    "prompt": sample.prompts[0],
                    "response": self.text(trace.response_ids.tolist(), sample.prompts[0]),
                    **({} if own is None else {"teacher_prompt": own}),
                    **({"teacher": teacher_of(sample.prompts[0])} if self.args.skd.teachers else {}),
                }
            )


def _mean_seconds(of_each: list[dict[str, float]]) -> dict[str, float]:
    """Of each part, over the engines."""
    names = {name for seconds in of_each for name in seconds}
    return {name: sum(seconds.get(name, 0.0) for seconds in of_each) / len(of_each) for name in sorted(names)}
