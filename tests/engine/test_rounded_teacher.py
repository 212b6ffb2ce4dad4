"""A teacher with rounded weights beside a full student: the student stays exact, also behind new weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from skd_plugin.core.trace import Trace
from tests.conftest import Logits, _make_model
from tests.rounding import round_weights
from tests.rules import make_rule

pytestmark = pytest.mark.engine
PROMPTS = [[1, 5 + i % 20, *range(3, 4 + i % 9)] for i in range(16)]


@pytest.fixture(scope="module")
def pair(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "pair"
    round_weights(tiny_pair / "teacher", folder / "teacher")
    shutil.copytree(tiny_pair / "student", folder / "student")
    return folder


def gap(samples: list, of: str, rows: list[torch.Tensor]) -> float:
    """Mean difference of a trace's log-probs from those of full weights, nats a token."""
    gaps = []
    for sample, row in zip(samples, rows, strict=True):
        trace: Trace = sample.trace
        logp = row[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        gaps.append((logp.gather(1, trace.response_ids.long()[:, None]).squeeze(1) - getattr(trace, of)).abs())
    return torch.cat(gaps).mean().item()


def test_a_rounded_teacher_beside_a_full_student(engine, pair: Path, reference_logits: Logits) -> None:
    rounded = engine(3, pair)
    assert rounded.description["quantization"] == "compressed-tensors"
    samples = rounded.generate(PROMPTS, make_rule(top_k=4), 32, seed=2)
    texts = [sample.prompt_ids + sample.trace.response_ids.tolist() for sample in samples]
    assert 1e-3 < gap(samples, "teacher_logp", reference_logits("teacher", texts)) < 0.5
    assert gap(samples, "student_logp", reference_logits("student", texts)) < 1e-5
    trained = _make_model(32, 1, seed=7)
    rounded.load_student(list(trained.state_dict().items()))
    samples = rounded.generate(PROMPTS, make_rule(top_k=4), 32, seed=2)
    texts = [sample.prompt_ids + sample.trace.response_ids.tolist() for sample in samples]
    with torch.no_grad():
        rows = [trained(torch.tensor([text])).logits[0].double() for text in texts]
    assert gap(samples, "student_logp", rows) < 1e-5
