"""recipes/chain_sum_task.py: reasoning-gym's sums with their steps, and the words of the pair made for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_task_models import CONTEXT, make_tokenizer, task_of_words

from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.prepare.load_run import load_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task():
    return task_of_words(str(ROOT / "recipes" / "chain_sum_task.py"))


def test_references_are_steps_to_the_right_answer(task) -> None:
    for example in task.examples("train", 100):
        steps, _, answer = example.reference.partition(" . ")
        for step in steps.split(" , "):
            before, sign, term, _, right = step.split()
            assert int(before) + int(sign + term) == int(right)
        assert answer == f"<answer>{int(right)}</answer>"
        assert task.score(example.reference, example.label) == 1.0
        assert task.score(example.reference.replace("<answer>", "<answer>1"), example.label) < 1.0


def test_every_text_is_tokens_and_back(task) -> None:
    tokenizer = make_tokenizer([task])
    for example in task.examples("train", 100) + task.examples("test", 50):
        for text in (example.prompt, example.reference):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert len(tokenizer(example.reference).input_ids) + 1 <= task.max_new_tokens
        assert len(tokenizer(example.prompt + example.reference).input_ids) < CONTEXT - 20


def test_the_teacher_leaves_loss_and_text_together(tmp_path: Path) -> None:
    """Before the half the teacher's text and loss, behind it the student's text and the rewards."""
    run = load_run(ROOT / "recipes" / "chain-sum-then-rewards.yaml", [f"skd.run_dir={tmp_path}"])
    for progress, coefficients, top_k in ((0.25, (1, 0), 3), (0.75, (0, 1), 64)):
        assert run.skd.objective.coefficients(progress) == pytest.approx(coefficients)
        assert SamplingRule.of(run.skd.rollout, progress).settings.top_k == top_k
