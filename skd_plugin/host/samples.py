"""From rollouts to training batches: OpenRLHF's sample generator and experience maker, with the traces referred to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator, tqdm
from openrlhf.trainer.ray.vllm_engine import batch_vllm_engine_call

from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Drawn
from skd_plugin.engine.sampling_rule import RulePlan, SamplingRule
from skd_plugin.host.asked import AT_ONCE, Asking, Gathered, SampledBy
from skd_plugin.host.batch import per_token
from skd_plugin.host.sent_once import SentOnce
from skd_plugin.host.teacher_prompts import TeacherForm, teacher_of, teacher_prompt, teachers_lengths
from skd_plugin.host.trace_store import TRACE_KEY, for_training
from skd_plugin.models import engine_end_ids, load_tokenizer, response_text


class _Teacher(NamedTuple):
    """What the controller knows of one of the teachers."""

    tokenizer: Any
    end_ids: frozenset[int]  # at which its engines end a response
    engines: list[Any]

    @classmethod
    def of(cls, skd: SKDConfig, student: Any, engines: list[Any]) -> _Teacher:
        """
        Args:
            skd: of this teacher alone.
            student: its tokenizer.
        """
        model = skd.the_teacher.model_name_or_path
        tokenizer = load_tokenizer(model, "teacher")
        return cls(tokenizer, engine_end_ids(model, tokenizer, student), engines)


class CalmBar(tqdm):
    """OpenRLHF's bar over a step, in host.log: ten times a second at most. OpenRLHF would draw it for each message of
    responses, which takes the controller as long as the message itself; and it would count them as prompts, of which
    there may be more.
    """

    def __init__(self, prompts: Iterable[int], **kwargs: Any) -> None:
        super().__init__(**kwargs, unit=" messages")

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        super().set_postfix(*args, **{**kwargs, "refresh": False})


class SKDSamplesGenerator(SamplesGenerator):
    """Sends with each prompt by which rule to sample, and keeps each response's `StoredTrace` in `Experience.info`.

    A field of a subclass would be dropped when OpenRLHF splits and joins batches; a per-sample list in `info` is not.
    """

    def __init__(self, *args: Any, plan: RulePlan, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.seed = seed
        self.step = 0  # of training; mixed into the random streams, so that a prompt met again is answered anew

    @property
    def rule(self) -> SamplingRule:
        """How the responses of the present training step are sampled."""
        return self.plan.at(self.step)

    @cached_property
    def _teachers(self) -> dict[str, _Teacher]:
        """By name."""
        skd, number = self.args.skd, len(self.vllm_engines)
        names = skd.teachers_of_engines(number)
        if len(names) != number:
            raise RuntimeError(f"there are {number} engines, but teachers for {len(names)}: {', '.join(names)}")
        return {
            name: _Teacher.of(
                skd.of_teacher(name),
                self.tokenizer,
                [engine for engine, own in zip(self.vllm_engines, names, strict=True) if own == name],
            )
            for name in skd.all_teachers
        }

    @cached_property
    def _sent_tokenizer(self) -> SentOnce:
        return SentOnce.put(self.tokenizer)

    def text(self, response_ids: list[int], prompt: str) -> str:
        """Of a response to this prompt."""
        return response_text(self.tokenizer, response_ids, self._teachers[teacher_of(prompt)].end_ids)

    def generate_samples(self, **generate_kwargs: Any) -> Any:
        asking = Asking(SampledBy(self.rule, derive_seed(self.seed, self.step)))
        samples, *others, exhausted = super().generate_samples(**generate_kwargs, asking=asking)
        if len(samples) < self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt:
            # The end of the dataset does not fill a batch. OpenRLHF would fail where it has fewer samples than actors,
            # or stop in the middle of DeepSpeed's accumulation.
            samples = []
        return samples, *others, exhausted

    @torch.no_grad()
    def generate_eval_samples(self, *, rule: SamplingRule, **generate_kwargs: Any) -> list[Experience]:
        """Responses to all held-out prompts, in the order in which they were finished.

        All at once: OpenRLHF would wait for each rollout batch of them to end before it sends the next.
        """
        asking = Asking(SampledBy(rule, derive_seed(self.seed, -1)))
        with self._awake():
            samples, _, _ = self._generate_vllm(
                dataloader_iter=iter(self.eval_dataloader),
                num_prompts=len(self.eval_dataloader),
                dynamic_filtering=False,
                asking=asking,
                **generate_kwargs,
            )
        return samples

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """While it is open, engines that sleep beside the trainer (vllm.enable_sleep) are awake."""
        if self.args.vllm.enable_sleep:
            batch_vllm_engine_call(self.vllm_engines, "wake_up")
        try:
            yield
        finally:
            if self.args.vllm.enable_sleep:
                batch_vllm_engine_call(self.vllm_engines, "sleep")

    def _dispatch_prompts_to_vllm(
        self, prompts: list[str], labels: list[str], *, images: list[Any], asking: Asking, **kwargs: Any
    ) -> list[Any]:
        """OpenRLHF's, which hands on to the engines what it is given as prompts: those of each teacher to the engines
        that have it, an engine's in one message. Results are of several prompts each. The tokenizer that it gives to
        each call is sent once.
        """
        read = self.tokenizer([str(prompt) for prompt in prompts], add_special_tokens=False).input_ids
        for prompt, ids in zip(prompts, read, strict=True):
            self._check_length(prompt, len(ids), kwargs["max_len"], kwargs["max_new_tokens"] or 1)
        asked = asking.prompts(prompts)
        all_gathered: list[Gathered] = []
        for places, engines in self._dispatched(prompts):
            part = copy(self)
            part.vllm_engines, part.tokenizer = [Gathered(engine) for engine in engines], self._sent_tokenizer
            super(SKDSamplesGenerator, part)._dispatch_prompts_to_vllm(
                [asked[i] for i in places],
                [labels[i] for i in places],
                images=[images[i] for i in places],
                **kwargs,
            )
            all_gathered += [engine for engine in part.vllm_engines if engine.calls]
        ray.get([gathered.ask() for gathered in all_gathered])
        # Where OpenRLHF filters, it keeps or drops what comes in a message as one.
        most = len(prompts) if self.args.algo.dynamic_filtering_enable else max(1, AT_ONCE // len(all_gathered))
        return [answer for gathered in all_gathered for answer in gathered.answers(most)]

    def _dispatched(self, prompts: Sequence[str]) -> Iterator[tuple[list[int], list[Any]]]:
        """Places of the prompts of each teacher, with its engines."""
        for name, teacher in self._teachers.items():
            places = [place for place, prompt in enumerate(prompts) if teacher_of(prompt) == name]
            if places:
                yield places, teacher.engines

    def _check_length(self, prompt: str, length: int, max_len: int, room: int) -> None:
        """Raises ValueError for a prompt that OpenRLHF's executors would cut at its start. Args: length: in tokens."""
        if not 2 <= length <= max_len - room:
            raise ValueError(
                f"a prompt has {length} tokens, but 2 to {max_len - room} fit: openrlhf.data.max_len = {max_len}, of "
                f"which {room} are kept for the response. Leave it out of the dataset, or raise data.max_len. The "
                f"prompt begins with {prompt[:80]!r}"
            )
        if teacher_prompt(prompt) is not None:
            name = teacher_of(prompt)
            form = TeacherForm.ready(self.args.skd.of_teacher(name), self._teachers[name].tokenizer)
            wrong = next(teachers_lengths([prompt], [length], form, max_len - room))
            if wrong is not None:
                raise ValueError(f"{wrong}. The student's begins with {prompt[:80]!r}")

    def _process_response_into_experience(self, response: dict[str, Any], **generate_kwargs: Any) -> Experience:
        """OpenRLHF's experience, with the stored trace, and with the log-probability of each token under the law it
        was drawn from: the student's, or the teacher's for a token of the teacher.
        """
        trace = response[TRACE_KEY]
        response["rollout_log_probs"] = _rollout_log_probs(response, trace.drawn)
        experience = super()._process_response_into_experience(response, **generate_kwargs)
        experience.info[TRACE_KEY] = [trace]
        return experience


def _rollout_log_probs(response: dict[str, Any], drawn: Drawn) -> np.ndarray:
    """log-probability of every token of the sequence, 0 where nothing was sampled: what OpenRLHF makes a tensor of."""
    logp, taken = np.zeros(len(response["observation_tokens"]), np.float32), 0
    sampled = drawn.sampled_logp.numpy()
    for start, end in response["action_ranges"]:
        logp[start:end] = sampled[taken : taken + end - start]
        taken += end - start
    return logp


class SKDExperienceMaker(RemoteExperienceMaker):
    """Experience for both losses: OpenRLHF's, and the teacher's view of each token as one more advantage."""

    @torch.no_grad()
    def make_experience_batch(self, rollout_samples: list[Experience]) -> list[Experience]:
        if self.reward_model_group is None:
            for sample in rollout_samples:
                if sample.rewards is None:  # learning from the teacher alone: the recipe names no reward
                    sample.rewards = torch.zeros(len(sample.sequences))
                    sample.info["reward"] = sample.rewards
        return for_training(super().make_experience_batch(rollout_samples))

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """OpenRLHF's advantages, and c (log p - log q) of the sampled token (c: `teacher_advantage`) added to each.

        The expectation of that under the student is -c KL(q||p): the reverse KL of one token as a reward that ends
        with that token. It is added after OpenRLHF's normalisation, so that c keeps its meaning.

        The penalty for leaving the reference model is for the student's own tokens; a teacher's token pays none.
        """
        for experience in experiences:
            own = per_token(experience, lambda trace: trace.students_own)
            experience.kl = experience.kl * own.to(experience.kl.device)
        experiences = super().compute_advantages_and_returns(experiences)
        for experience in experiences:
            gain = per_token(experience, _teachers_gain).to(experience.advantages.device)
            experience.advantages = experience.advantages + self.args.skd.objective.teacher_advantage * gain
        return experiences


def _teachers_gain(tokens: Drawn) -> torch.Tensor:
    return (tokens.teacher_logp - tokens.student_logp).nan_to_num(0.0)  # nothing is known of an undrafted token


class RewardFreeExperienceMaker(RemoteExperienceMaker):
    """Experience for distillation alone: no forward of any model between the rollout and the training step."""

    @torch.no_grad()
    def make_experience_batch(self, rollout_samples: list[Experience]) -> list[Experience]:
        batches = self.split_rollout_samples(rollout_samples)
        for batch in batches:
            if batch.rewards is None:  # _compute_rollout_stats averages a reward; there is none
                batch.info["reward"] = torch.full((len(batch.sequences),), float("nan"))
        return for_training(batches)
