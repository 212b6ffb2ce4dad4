"""One engine in a process of its own: it answers the prompts of a job and ends, so that its memory is free again.

python -m skd_plugin.evaluate.answers alone|beside FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skd_plugin.config.schema import RolloutConfig
from skd_plugin.core.accept import ACCEPTED
from skd_plugin.core.rng import derive_seed
from skd_plugin.core.trace import Trace
from skd_plugin.engine.offline import Sample, SKDEngine, end_tokens, engine_arguments, machine_arguments, set_vllm_up
from skd_plugin.engine.sampling_rule import KEEP_ALL, SamplingRule
from skd_plugin.models import load_tokenizer
from skd_plugin.run_folder import Status

CUTS = (0.25, 0.5, 0.75)
WHOLE_PROMPTS = 8192  # tokens of prompts that are read at once
SAMPLES, STUDENT, SKD, TEACHER, SPECULATION = range(5)  # random streams


@dataclass(frozen=True)
class Job:
    student: str
    teacher: str | None
    measures: list[str]
    prompt_ids: list[list[int]]
    limits: list[int]
    top_k: list[int | None]
    references: list[str | None]
    samples: int
    temperature: float
    seed: int
    max_len: int
    rollout: dict[str, Any]  # RolloutConfig
    vllm: dict[str, Any]

    def write(self, folder: Path) -> None:
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Job:
        return cls(**json.loads((folder / "job.json").read_text()))


def alone(job: Job, status: Status) -> dict[str, Any]:
    """The student in plain vLLM: greedy responses, and sampled ones, a list a prompt."""
    set_vllm_up()
    from vllm import LLM

    status.stage("starting vLLM with the student alone")
    # Whole prompts: vLLM takes back the random numbers of a prompt that was read in part, which no CPU generator can.
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(WHOLE_PROMPTS, job.max_len)}
    arguments = machine_arguments() | {"max_model_len": job.max_len} | whole | job.vllm
    llm = LLM(model=job.student, disable_log_stats=True, **arguments)
    tokenizer = load_tokenizer(job.student, "student")
    end, special = end_tokens(tokenizer), set(tokenizer.all_special_ids)

    def answers(temperature: float, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Responses to every prompt in turn, as many as there are `numbers`, which name their random streams."""
        places = [(place, number) for place in range(len(job.prompt_ids)) for number in numbers]
        status.stage(f"sampling {len(places):,} responses" if temperature else f"{len(places):,} greedy responses")
        params = [
            plain_params(temperature, job.limits[place], end, derive_seed(job.seed, SAMPLES, place, number))
            for place, number in places
        ]
        prompts = [{"prompt_token_ids": job.prompt_ids[place]} for place, _ in places]
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        return [
            {
                "length": len(output.token_ids),
                "ids": [token for token in output.token_ids if token not in special],
                "text": tokenizer.decode(output.token_ids, skip_special_tokens=True),
                "ended": output.finish_reason == "stop",
            }
            for output in outputs
        ]

    greedy, sampled = answers(0.0, [0]), answers(job.temperature, range(job.samples))
    count = job.samples
    return {"greedy": greedy, "sampled": [sampled[i : i + count] for i in range(0, len(sampled), count)]}


def plain_params(temperature: float, limit: int, end: list[int], seed: int) -> Any:
    """vLLM's SamplingParams of one response, with a random stream of its own; greedy at temperature 0."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        max_tokens=limit,
        stop_token_ids=end,
        seed=seed % 2**63,  # torch takes no negative one
        detokenize=False,
    )


def engine_of(job: Job) -> SKDEngine:
    assert job.teacher is not None
    draft_len = job.rollout["draft_len"]
    return SKDEngine(**engine_arguments(job.teacher, job.student, draft_len, job.max_len, 1, **job.vllm))


class Beside:
    """The student as the draft model of its teacher."""

    def __init__(self, job: Job, engine: SKDEngine, status: Status) -> None:
        self._job, self._engine, self._status = job, engine, status
        self._rollout = RolloutConfig(**job.rollout)
        self._at_ease = SamplingRule(KEEP_ALL, job.temperature, 1.0, job.temperature, 1.0)
        self._of_student: list[Sample] | None = None

    def measure(self) -> dict[str, Any]:
        parts = {"distance": self._distance, "prefixes": self._prefixes, "speculation": self._speculation}
        return {name: measure() for name, measure in parts.items() if name in self._job.measures}

    def _generate(self, doing: str, rule: SamplingRule, stream: int, **others: Any) -> list[Sample]:
        self._status.stage(f"{len(self._job.prompt_ids):,} {doing}")
        seed = derive_seed(self._job.seed, stream)
        rules = [rule.with_top_k(own) for own in self._job.top_k]
        return self._engine.generate(self._job.prompt_ids, rules, self._job.limits, seed=seed, **others)

    def _student_texts(self) -> list[Sample]:
        if self._of_student is None:
            self._of_student = self._generate("texts of the student", self._at_ease, STUDENT)
        return self._of_student

    def _distance(self) -> dict[str, Any]:
        job = self._job
        greedy = self._at_ease.student_only(0.0)
        found = {
            "sampled": self._student_texts(),
            "greedy": self._generate("greedy texts of the student", greedy, STUDENT),
        }
        if None not in job.references:
            rule = replace(self._at_ease, reference_share=1.0)
            found["references"] = self._generate("references", rule, STUDENT, texts=job.references)
        return {name: [_distances(sample.trace) for sample in samples] for name, samples in found.items()}

    def _prefixes(self) -> dict[str, Any]:
        """Texts of three sources, and how the teacher goes on from the beginnings of each, greedily."""
        gate = SamplingRule.of(self._rollout.model_copy(update={"method": "skd"}))
        sources = {
            "student": self._student_texts(),
            "skd": self._generate("texts of SKD", gate, SKD),
            "teacher": self._generate(
                "texts of the teacher", self._at_ease.teacher_only(self._job.temperature), TEACHER
            ),
        }
        greedy = self._at_ease.teacher_only(0.0)
        found: dict[str, Any] = {
            "alone": [sample.text for sample in self._generate("greedy texts of the teacher", greedy, TEACHER)]
        }
        for name, samples in sources.items():
            cuts = {str(share): self._continued(name, samples, share, greedy) for share in CUTS}
            found[name] = {**cuts, "1": [sample.text for sample in samples]}
        return found

    def _continued(self, source: str, samples: list[Sample], share: float, rule: SamplingRule) -> list[str]:
        self._status.stage(f"the teacher goes on from {share:.0%} of {len(samples):,} texts of {source}")
        heads = [sample.trace.response_ids[: int(share * len(sample.trace))].tolist() for sample in samples]
        continued = self._engine.generate(
            [prompt + head for prompt, head in zip(self._job.prompt_ids, heads, strict=True)],
            rule,
            [limit - len(head) for limit, head in zip(self._job.limits, heads, strict=True)],
        )
        tails = [sample.trace.response_ids.tolist() for sample in continued]
        return [self._engine.decode(head + tail) for head, tail in zip(heads, tails, strict=True)]

    def _speculation(self) -> dict[str, list[list[bool]]]:
        """Of each token, whether the student's proposal was kept, in text whose law is the teacher's."""
        found = {}
        for name, temperature in (("sampled", self._job.temperature), ("greedy", 0.0)):
            rule = SamplingRule(KEEP_ALL, temperature, 1.0, temperature, 1.0, gate="interpolated", threshold=1.0)
            samples = self._generate(f"{name} texts of the teacher, drafted by the student", rule, SPECULATION)
            found[name] = [(sample.trace.source == ACCEPTED).tolist() for sample in samples]
        return found


def _distances(trace: Trace) -> dict[str, float]:
    """Sums over the tokens of which both models are known."""
    known = ~trace.kl.isnan()
    names = ("kl", "student_entropy", "teacher_entropy")
    return {"tokens": int(known.sum()), **{name: getattr(trace, name)[known].double().sum().item() for name in names}}


def main(arguments: Sequence[str]) -> None:
    kind, folder = arguments[0], Path(arguments[1])
    torch.manual_seed(0)
    job, status = Job.read(folder), Status(folder)
    if kind == "alone":
        found = alone(job, status)
    else:
        status.stage("starting vLLM with teacher and student")
        found = Beside(job, engine_of(job), status).measure()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
