"""An engine of two ranks: the tokens and traces of one rank, before and after new weights of the student.

The last of its folder: its end takes the process groups of this process with it, and no further engine starts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from skd_plugin.engine.scheduler import SKDScheduler
from tests.conftest import _make_model
from tests.rules import make_rule
from tests.traces import same_trace

pytestmark = pytest.mark.engine
PROMPTS = [[1, 5 + i % 20, *range(3, 4 + i % 9)] for i in range(20)]
TEXTS = ["abcdefghijklmnop"[: 2 + i % 14] for i in range(len(PROMPTS))]
RULE = make_rule(top_k=4, reference_share=0.25)
# So small a cache that requests are preempted: the second rank, too, must know their last tokens.
TIGHT = {"num_gpu_blocks_override": 9, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def pair(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair, with a student that has a head for each rank."""
    folder = tmp_path_factory.mktemp("two_heads") / "pair"
    shutil.copytree(tiny_pair, folder)
    _make_model(64, 1, seed=5).save_pretrained(folder / "student")
    return folder


def kept(worker: Any) -> int:
    return len(worker._skd_requests._batches)


def test_two_ranks_sample_what_one_does(
    engine, pair: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    preempted: list[Any] = []
    preempt = SKDScheduler._preempt_request
    monkeypatch.setattr(SKDScheduler, "_preempt_request", lambda *a, **k: preempted.append(a) or preempt(*a, **k))
    one, two = engine(3, pair), engine(3, pair, tensor_parallel_size=2, **TIGHT)
    request.addfinalizer(two._llm.llm_engine.engine_core.shutdown)
    replies: list[list[Any]] = []
    call = two._llm.collective_rpc

    def collective_rpc(method: Any, **arguments: Any) -> list[Any]:
        replies.append(call(method, **arguments))
        return replies[-1]

    monkeypatch.setattr(two._llm, "collective_rpc", collective_rpc)

    def sampled(engine) -> list:
        return engine.generate(PROMPTS, RULE, 48, seed=3, texts=TEXTS)

    before = sampled(one)
    for mine, theirs in zip(sampled(two), before, strict=True):
        same_trace(mine.trace, theirs.trace)
    assert preempted, "the second rank was never asked for a last token"
    assert [len(traces) for traces in replies[-1]] == [len(PROMPTS), 0]
    assert call(kept) == [0, 0], "a rank keeps what nobody will fetch"
    trained = list(_make_model(64, 1, seed=6).state_dict().items())
    for each in (one, two):
        each.load_student(trained)
    after = sampled(one)
    assert any(new.text != old.text for new, old in zip(after, before, strict=True))
    for mine, theirs in zip(sampled(two), after, strict=True):
        same_trace(mine.trace, theirs.trace)
