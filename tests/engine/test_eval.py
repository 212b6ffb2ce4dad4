"""What `skd eval` reads off the engine, on the tiny pair: distances against transformers, cuts, and repetition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.engine.request import Sample
from skd_plugin.evaluate.engine_process import Beside
from skd_plugin.evaluate.job import Job, Prompt
from skd_plugin.run_folder import Status
from tests.conftest import EOS, MAX_LEN
from tests.specs import make_spec

pytestmark = pytest.mark.engine

PROMPTS = [[1, 5, 9], [1, 7], [1, 20, 11, 4], [1, 3]]
LIMIT = 12


@pytest.fixture
def job() -> Job:
    return Job(
        spec=make_spec(draft_len=3, max_len=MAX_LEN),
        measures=["distance", "prefixes", "speculation"],
        prompts=[
            Prompt(ids, LIMIT, None, reference)
            for ids, reference in zip(PROMPTS, ["a cat", "tom", "x = y", "z"], strict=True)
        ],
        samples=1,
        temperature=1.0,
        seed=3,
        rollout=RolloutConfig(top_k=3, draft_len=3).model_dump(),
    )


class Watched(Beside):
    """Keeps every text that the engine was asked for, in the order of the questions."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.texts: list[list[Sample]] = []
        generate = self._engine.generate
        self._engine = type("Engine", (), {"decode": self._engine.decode})()

        def keep(*args, **kwargs):
            self.texts.append(generate(*args, **kwargs))
            return self.texts[-1]

        self._engine.generate = keep


def test_the_same_job_gives_the_same_answers(engine, job, tmp_path: Path) -> None:
    first, second = (Beside(job, engine(3), Status(tmp_path)).measure() for _ in range(2))
    for one, again in zip(first, second, strict=True):
        assert one["prefixes"] == again["prefixes"] and one["speculation"] == again["speculation"]
        assert list(one["distance"]) == list(again["distance"]) == ["sampled", "greedy", "references"]
        for text, sums in one["distance"].items():  # the second time the prefixes are in the cache
            assert sums == pytest.approx(again["distance"][text], rel=1e-4)
    assert Beside(Job(**{**vars(job), "seed": 4}), engine(3), Status(tmp_path)).measure() != first


def test_distances_are_those_of_transformers(engine, job, tmp_path: Path, reference_logits) -> None:
    watched = Watched(Job(**{**vars(job), "measures": ["distance"]}), engine(3), Status(tmp_path))
    found = [answers["distance"] for answers in watched.measure()]
    assert all(list(one) == ["sampled", "greedy", "references"] for one in found)
    for name, samples in zip(found[0], watched.texts, strict=True):
        sums = [one[name] for one in found]
        sequences = [[*sample.prompt_ids, *sample.trace.response_ids.tolist()] for sample in samples]
        both = (reference_logits(model, sequences) for model in ("teacher", "student"))
        for one, sample, *logits in zip(sums, samples, *both, strict=True):
            p_RV, q_RV = (rows[len(sample.prompt_ids) - 1 : -1].log_softmax(-1) for rows in logits)
            assert one["tokens"] == len(sample.trace) == len(p_RV)
            assert one["kl"] == pytest.approx((p_RV.exp() * (p_RV - q_RV)).sum().item(), rel=1e-3, abs=1e-4)
            for entropy, logp_RV in (("teacher_entropy", p_RV), ("student_entropy", q_RV)):
                assert one[entropy] == pytest.approx(-(logp_RV.exp() * logp_RV).sum().item(), rel=1e-3, abs=1e-4)
    greedy = watched.texts[1]
    for sample in greedy:
        ids = [*sample.prompt_ids, *sample.trace.response_ids.tolist()]
        (logits,) = reference_logits("student", [ids])
        assert logits[len(sample.prompt_ids) - 1 : -1].argmax(-1).tolist() == sample.trace.response_ids.tolist()
    assert all(sample.trace.response_ids[-1] == EOS for sample in watched.texts[2])


def test_the_teacher_goes_on_from_the_tokens_themselves(engine, job, tmp_path: Path) -> None:
    watched = Watched(Job(**{**vars(job), "measures": ["prefixes"]}), engine(3), Status(tmp_path))
    found = [answers["prefixes"] for answers in watched.measure()]
    assert all(set(one) == {"alone", "student", "skd", "teacher"} for one in found)
    student, _, _, alone, *continued = watched.texts
    for number, share in enumerate((0.25, 0.5, 0.75)):
        for place, (whole, tail) in enumerate(zip(student, continued[number], strict=True)):
            head = whole.trace.response_ids[: int(share * len(whole.trace))].tolist()
            assert tail.prompt_ids == PROMPTS[place] + head
            assert len(head) + len(tail.trace) <= LIMIT
            both = [*head, *tail.trace.response_ids.tolist()]
            assert found[place]["student"][str(share)] == watched._engine.decode(both)
    assert [one["student"]["1"] for one in found] == [sample.text for sample in student]
    assert [one["alone"] for one in found] == [sample.text for sample in alone]


def test_greedy_speculation_keeps_what_the_teacher_would_say(engine, job, tmp_path: Path, reference_logits) -> None:
    watched = Watched(Job(**{**vars(job), "measures": ["speculation"]}), engine(3), Status(tmp_path))
    found = [answers["speculation"] for answers in watched.measure()]
    assert [[len(one[name]) for one in found] for name in ("sampled", "greedy")] == [
        [len(sample.trace) for sample in samples] for samples in watched.texts
    ]
    for kept, sample in zip([one["greedy"] for one in found], watched.texts[1], strict=True):
        ids = [*sample.prompt_ids, *sample.trace.response_ids.tolist()]
        teacher, student = (
            reference_logits(name, [ids])[0][len(sample.prompt_ids) - 1 : -1].argmax(-1)
            for name in ("teacher", "student")
        )
        assert torch.equal(teacher, sample.trace.response_ids.long())
        assert kept == (teacher == student).tolist()
