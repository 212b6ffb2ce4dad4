"""One engine in a process of its own: it answers the prompts of a job and ends, so that its memory is free again.

python -m skd_plugin.evaluate.engine_process alone|beside FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.sampling import KEEP_ALL, SamplingSettings
from skd_plugin.core.trace import Source, Trace
from skd_plugin.engine.offline import PlainEngine, SKDEngine
from skd_plugin.engine.request import Sample
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.evaluate.job import Answers, Continuations, Distance, Job, Response, write_answers
from skd_plugin.run_folder import Status

CUTS = (0.25, 0.5, 0.75)
SAMPLES, STUDENT, SKD, TEACHER, SPECULATION = range(5)  # random streams


def alone(job: Job, status: Status) -> list[Answers]:
    """The student in plain vLLM: greedy and sampled responses."""
    status.stage("starting vLLM with the student alone")
    engine = PlainEngine(job.spec)
    special = set(engine.tokenizer.all_special_ids)

    def respond(temperature: float, numbers: Iterable[int]) -> list[Response]:
        """Responses to every prompt in turn, as many as there are `numbers`, which name their random streams."""
        places = [(place, number) for place in range(len(job.prompts)) for number in numbers]
        status.stage(f"sampling {len(places):,} responses" if temperature else f"{len(places):,} greedy responses")
        responses = engine.generate(
            [job.prompts[place].ids for place, _ in places],
            [job.prompts[place].limit for place, _ in places],
            [derive_seed(job.seed, SAMPLES, place, number) for place, number in places],
            temperature,
        )
        return [
            {
                "length": len(response.ids),
                "ids": [token for token in response.ids if token not in special],
                "text": response.text,
                "ended": response.ended,
            }
            for response in responses
        ]

    greedy, sampled = respond(0.0, [0]), respond(job.temperature, range(job.samples))
    count = job.samples
    return [
        {"greedy": response, "sampled": sampled[place * count : (place + 1) * count]}
        for place, response in enumerate(greedy)
    ]


class Beside:
    """The student as the draft model of its teacher."""

    def __init__(self, job: Job, engine: SKDEngine, status: Status) -> None:
        self._job, self._engine, self._status = job, engine, status
        self._rollout = RolloutConfig(**job.rollout)
        self._ungated = SamplingRule(
            SamplingSettings(KEEP_ALL, student_temperature=job.temperature, teacher_temperature=job.temperature)
        )
        self._of_student: list[Sample] | None = None

    def measure(self) -> list[Answers]:
        answers: list[Answers] = [{} for _ in self._job.prompts]
        if "distance" in self._job.measures:
            for own, distance in zip(answers, self._distance(), strict=True):
                own["distance"] = distance
        if "prefixes" in self._job.measures:
            for own, prefixes in zip(answers, self._prefixes(), strict=True):
                own["prefixes"] = prefixes
        if "speculation" in self._job.measures:
            for own, speculation in zip(answers, self._speculation(), strict=True):
                own["speculation"] = speculation
        return answers

    def _generate(
        self, doing: str, rule: SamplingRule, stream: int, references: list[str | None] | None = None
    ) -> list[Sample]:
        """A response to each prompt; a rule with references answers by those of the prompts."""
        prompts = self._job.prompts
        self._status.stage(f"{len(prompts):,} {doing}")
        return self._engine.generate(
            [prompt.ids for prompt in prompts],
            [rule.with_top_k(prompt.top_k) for prompt in prompts],
            [prompt.limit for prompt in prompts],
            seed=derive_seed(self._job.seed, stream),
            texts=references,
            teacher_prompts=[prompt.of_teacher for prompt in prompts],
        )

    def _student_texts(self) -> list[Sample]:
        if self._of_student is None:
            self._of_student = self._generate("texts of the student", self._ungated, STUDENT)
        return self._of_student

    def _distance(self) -> list[dict[str, Distance]]:
        greedy = self._ungated.student_only(0.0)
        texts = {
            "sampled": self._student_texts(),
            "greedy": self._generate("greedy texts of the student", greedy, STUDENT),
        }
        references = [prompt.reference for prompt in self._job.prompts]
        if None not in references:
            rule = replace(self._ungated, reference_share=1.0)
            texts["references"] = self._generate("references", rule, STUDENT, references)
        return [
            {name: _distance(samples[place].trace) for name, samples in texts.items()}
            for place in range(len(references))
        ]

    def _prefixes(self) -> list[Continuations]:
        """Texts of three sources, and how the teacher goes on from the beginnings of each, greedily."""
        gate = SamplingRule.of(self._rollout.model_copy(update={"method": "skd"}))
        of_teacher = self._ungated.teacher_only(self._job.temperature)
        sources = {
            "student": self._student_texts(),
            "skd": self._generate("texts of SKD", gate, SKD),
            "teacher": self._generate("texts of the teacher", of_teacher, TEACHER),
        }
        greedy = self._ungated.teacher_only(0.0)
        alone = self._generate("greedy texts of the teacher", greedy, TEACHER)
        texts = {
            name: {str(share): self._continued(name, samples, share, greedy) for share in CUTS}
            | {"1": [self._engine.decode(sample.trace.response_ids.tolist()) for sample in samples]}
            for name, samples in sources.items()
        }

        def at(place: int, source: str) -> dict[str, str]:
            return {share: continued[place] for share, continued in texts[source].items()}

        return [
            {
                "alone": self._engine.decode(sample.trace.response_ids.tolist()),
                "student": at(place, "student"),
                "skd": at(place, "skd"),
                "teacher": at(place, "teacher"),
            }
            for place, sample in enumerate(alone)
        ]

    def _continued(self, source: str, samples: list[Sample], share: float, rule: SamplingRule) -> list[str]:
        self._status.stage(f"the teacher goes on from {share:.0%} of {len(samples):,} texts of {source}")
        heads = [sample.trace.response_ids[: int(share * len(sample.trace))].tolist() for sample in samples]
        pairs = list(zip(self._job.prompts, heads, strict=True))
        continued = self._engine.generate(
            [prompt.ids + head for prompt, head in pairs],
            rule,
            [prompt.limit - len(head) for prompt, head in pairs],
            teacher_prompts=[prompt.of_teacher + head for prompt, head in pairs],
        )
        tails = [sample.trace.response_ids.tolist() for sample in continued]
        return [self._engine.decode(head + tail) for head, tail in zip(heads, tails, strict=True)]

    def _speculation(self) -> list[dict[str, list[bool]]]:
        """Whether the student's proposal for each token was kept, in text that has the teacher's distribution."""
        kept = {}
        for name, temperature in (("sampled", self._job.temperature), ("greedy", 0.0)):
            rule = SamplingRule(
                SamplingSettings(
                    KEEP_ALL,
                    "interpolated",
                    threshold=1.0,
                    student_temperature=temperature,
                    teacher_temperature=temperature,
                )
            )
            samples = self._generate(f"{name} texts of the teacher, drafted by the student", rule, SPECULATION)
            kept[name] = [(sample.trace.source == Source.ACCEPTED).tolist() for sample in samples]
        return [{name: rows[place] for name, rows in kept.items()} for place in range(len(self._job.prompts))]


def _distance(trace: Trace) -> Distance:
    """Sums over the tokens of which both models are known."""
    known = ~trace.kl.isnan()

    def total(values: torch.Tensor) -> float:
        return values[known].double().sum().item()

    return {
        "tokens": int(known.sum()),
        "kl": total(trace.kl),
        "student_entropy": total(trace.student_entropy),
        "teacher_entropy": total(trace.teacher_entropy),
    }


def main(arguments: Sequence[str]) -> None:
    kind, folder = arguments[0], Path(arguments[1])
    torch.manual_seed(0)
    job, status = Job.read(folder), Status(folder)
    if kind == "alone":
        answers = alone(job, status)
    else:
        status.stage("starting vLLM with teacher and student")
        answers = Beside(job, SKDEngine(job.spec), status).measure()
    write_answers(folder, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
