"""What an engine's process is asked, and what it answers: job.json and answers.json in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from skd_plugin.engine.arguments import EngineSpec


@dataclass(frozen=True)
class Prompt:
    """One held-out prompt as a student reads it."""

    ids: list[int]
    limit: int  # tokens of the longest response
    top_k: int | None = None  # K of the prompt's task; None is the run's
    reference: str | None = None
    teacher_ids: list[int] | None = None  # the teacher's own

    @property
    def of_teacher(self) -> list[int]:
        """As the teacher reads it."""
        return self.ids if self.teacher_ids is None else self.teacher_ids


@dataclass(frozen=True)
class Job:
    spec: EngineSpec
    measures: list[str]
    prompts: list[Prompt]
    samples: int
    temperature: float
    seed: int
    rollout: dict[str, Any]  # RolloutConfig

    def write(self, folder: Path) -> None:
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Job:
        content = json.loads((folder / "job.json").read_text())
        prompts = [Prompt(**prompt) for prompt in content["prompts"]]
        return cls(**{**content, "spec": EngineSpec(**content["spec"]), "prompts": prompts})


class Response(TypedDict):
    length: int  # tokens, the end token among them
    ids: list[int]  # without special tokens
    text: str
    ended: bool  # by an end token, and not by the limit


class Distance(TypedDict):
    """Sums over the tokens of a text, in nats."""

    tokens: int
    kl: float
    student_entropy: float
    teacher_entropy: float


class Continuations(TypedDict):
    """Texts of the teacher: alone, and from the beginnings of a text of each source, by the share that it began with;
    "1" is that text itself."""

    alone: str
    student: dict[str, str]
    skd: dict[str, str]
    teacher: dict[str, str]


class Answers(TypedDict, total=False):
    """What the engines found for one prompt; a measure that was not asked for is not there."""

    greedy: Response
    sampled: list[Response]
    distance: dict[str, Distance]  # by the name of the text
    prefixes: Continuations
    speculation: dict[str, list[bool]]  # by the name of the text: whether each token was the student's proposal


def write_answers(folder: Path, answers: Iterable[Answers]) -> None:
    (folder / "answers.json").write_text(json.dumps(list(answers)))


def read_answers(folder: Path) -> list[Answers]:
    return json.loads((folder / "answers.json").read_text())
