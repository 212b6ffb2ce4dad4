"""The pieces of scripts/make_multi30k_pair.py; the training itself is not run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from skd_plugin.tasks import Example

SCRIPTS = Path(__file__).parents[2] / "scripts"
PAIRS = [("A dog runs.\n", "Ein Hund rennt."), ("Two small cats sleep here.\n", "Zwei kleine Katzen schlafen hier.")]
EXAMPLES = [Example(english, german, german) for english, german in PAIRS]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("make_multi30k_pair", SCRIPTS / "make_multi30k_pair.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def test_a_pass_has_every_example_once(script: ModuleType) -> None:
    lengths = [10 + index % 50 for index in range(1000)]
    steps = script.batches(lengths, seed=1, passes=2)
    first = steps[: len(steps) // 2]
    assert sorted(index for step in first for index in step) == list(range(1000))
    assert script.batches(lengths, seed=1, passes=0.5) == steps[: round(len(steps) / 4)]
    assert script.batches(lengths, seed=2, passes=2) != steps


def test_the_loss_is_of_the_german_side_and_padding_does_nothing(script: ModuleType) -> None:
    tokenizer = script.make_tokenizer(EXAMPLES)
    model = script.make_model(dict(script.STUDENT, num_hidden_layers=1), tokenizer, seed=0).eval()
    counts = [len(tokenizer(e.reference).input_ids) + 1 for e in EXAMPLES]
    alone = [script.loss_of(model, script.padded([example], tokenizer)).item() for example in EXAMPLES]
    both = script.loss_of(model, script.padded(EXAMPLES, tokenizer)).item()
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert both == pytest.approx(expected, rel=2e-2)  # bfloat16
    assert tokenizer.decode(tokenizer("Zwei Hunde, müde!").input_ids) == "Zwei Hunde, müde!"


def test_an_unfinished_training_goes_on(script: ModuleType, tmp_path: Path) -> None:
    tokenizer = script.make_tokenizer(EXAMPLES)
    models = [script.make_model(dict(script.STUDENT, num_hidden_layers=1), tokenizer, seed) for seed in range(2)]
    optimizers = [script.make_optimizers(model) for model in models]
    script.loss_of(models[0], script.padded(EXAMPLES, tokenizer)).backward()
    for optimizer in optimizers[0]:
        optimizer.step()
    script.keep(tmp_path / "kept.pt", 7, models[0], *optimizers[0])
    assert script.go_on(tmp_path / "kept.pt", models[1], *optimizers[1]) == 7
    for mine, kept in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, kept)
    assert len(optimizers[1][0].state) == len(optimizers[0][0].state) == 7


def test_dropout_ends_with_training(script: ModuleType) -> None:
    tokenizer = script.make_tokenizer(EXAMPLES)
    model = script.make_model(dict(script.STUDENT, num_hidden_layers=1), tokenizer, seed=0)
    script.add_dropout(model)
    batch = script.padded(EXAMPLES, tokenizer)
    assert script.loss_of(model.train(), batch).item() != script.loss_of(model, batch).item()
    assert script.loss_of(model.eval(), batch).item() == script.loss_of(model, batch).item()
