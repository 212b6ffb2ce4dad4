"""The pieces of scripts/make_task_models.py; the training itself is not run."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from skd_plugin.tasks import GENERATED
from skd_plugin.tasks.generated import GeneratedTask

ROOT = Path(__file__).parents[2]
TINY = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_task_models", ROOT / "scripts" / "make_task_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks() -> list[GeneratedTask]:
    return [kind() for kind in GENERATED]


def test_tokenizer_of_the_committed_pair(script: ModuleType, tasks: list[GeneratedTask], tmp_path: Path) -> None:
    script.make_tokenizer(tasks[:1]).save_pretrained(tmp_path)
    made, known = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (tmp_path, ROOT / "recipes" / "models" / "arithmetic" / "teacher")
    )
    for part in ("model", "pre_tokenizer", "decoder", "added_tokens"):
        assert made[part] == known[part], part


@pytest.mark.parametrize("places", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_every_text_is_tokens_and_back(
    script: ModuleType, tasks: list[GeneratedTask], places: tuple[int, ...]
) -> None:
    tokenizer = script.make_tokenizer([tasks[place] for place in places])
    for place in places:
        for example in tasks[place].examples("train", 50) + tasks[place].examples("test", 20):
            for text in (example.prompt, example.reference):
                ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            total = len(tokenizer(example.prompt + example.reference).input_ids) + 1
            assert len(tokenizer(example.reference).input_ids) + 1 <= tasks[place].max_new_tokens
            assert total < script.CONTEXT - 20, "no room for the drafts of a block"


def test_batch_trains_responses_and_nothing_else(script: ModuleType, tasks: list[GeneratedTask]) -> None:
    tokenizer = script.make_tokenizer(tasks)
    made = script.batches(tasks, tokenizer, random.Random(0), script.even_shares(4, 10))
    firsts = [[text.split()[0] for text in tokenizer.batch_decode(part["input_ids"])] for part in made]
    assert [len(part) for part in firsts] == [3, 3, 2, 2]
    assert [set(part) for part in firsts[1:]] == [{"translate"}, {"summarise"}, {"words"}]
    for part in made:
        for ids, labels, mask in zip(part["input_ids"], part["labels"], part["attention_mask"], strict=True):
            trained = labels != -100
            first, last = int(trained.nonzero()[0]), int(trained.nonzero()[-1])
            assert trained[first : last + 1].all() and torch.equal(labels[trained], ids[trained])
            assert ids[last] == tokenizer.eos_token_id and int(mask.sum()) == last + 1
    again = script.batches(tasks, tokenizer, random.Random(0), script.even_shares(4, 10))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again, strict=True))


def test_gradients_are_those_of_the_mean_over_all_tokens(
    script: ModuleType, tasks: list[GeneratedTask], monkeypatch: Any
) -> None:
    monkeypatch.setitem(script.SHAPES, "student", TINY)
    tokenizer = script.make_tokenizer(tasks)
    parts, model = (
        script.batches(tasks, tokenizer, random.Random(0), [2, 2, 2, 2]),
        script.make_model(script.SHAPES["student"], tokenizer, script.SEEDS["student"]),
    )
    mean = script.backward(model, parts)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sums = [model(**part).loss * (part["labels"] != -100).sum() for part in parts]
    expected = sum(sums) / sum((part["labels"] != -100).sum() for part in parts)
    expected.backward()
    assert mean == pytest.approx(expected.item())
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_known_task_is_taken_over(script: ModuleType, tasks: list[GeneratedTask], tmp_path: Path) -> None:
    """With more words behind the known ones, the same logits of the known ones."""
    small, large = script.make_tokenizer(tasks[:1]), script.make_tokenizer(tasks)
    first, model = (
        script.make_model(script.SHAPES["teacher"], small, script.SEEDS["teacher"]),
        script.make_model(script.SHAPES["teacher"], large, script.SEEDS["teacher"]),
    )
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    first.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    script.take_over(model, large, tmp_path)
    text = tasks[0].examples("train", 1)[0].prompt
    own, known = (m(**t(text, return_tensors="pt")).logits[0] for m, t in ((model, large), (first, small)))
    places = [large.get_vocab()[token] for token in sorted(small.get_vocab(), key=small.get_vocab().get)]
    torch.testing.assert_close(own[:, places], known[:, : len(places)])
    script.take_over(model, large, tmp_path, as_unknown=True)
    own = model(**large(text, return_tensors="pt")).logits[0]
    torch.testing.assert_close(own[:, places], known[:, : len(places)])
    others = [place for place in range(own.shape[1]) if place not in places]
    torch.testing.assert_close(own[:, others], own[:, [large.unk_token_id]].expand(-1, len(others)))


def test_measure_is_the_tasks_own(script: ModuleType, tasks: list[GeneratedTask], monkeypatch: Any) -> None:
    """A model that writes nothing but the end token."""
    monkeypatch.setitem(script.SHAPES, "student", TINY)
    tokenizer = script.make_tokenizer(tasks)
    model = script.make_model(script.SHAPES["student"], tokenizer, script.SEEDS["student"])
    monkeypatch.setattr(
        type(model), "generate", lambda self, input_ids, **_: torch.cat([input_ids, torch.full((4, 1), 2)], dim=1)
    )
    for task in tasks:
        metrics = script.measure(model, tokenizer, task, count=4)
        assert next(iter(metrics)) == task.metric and set(metrics.values()) == {0.0}


def test_both_models_are_written(script: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    for name in script.SHAPES:
        monkeypatch.setitem(script.SHAPES, name, TINY)
    monkeypatch.setattr(script, "measure", lambda *_: {"chrf": 0.0})
    script.main(["translation", "instructions", str(tmp_path), "--teacher-steps", "1", "--student-steps", "1"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert "<unk>" not in tokenizer.tokenize("translate : words :")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_unfinished_training_goes_on(script: ModuleType, tasks: list, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(script.SHAPES, "teacher", TINY)
    monkeypatch.setattr(script, "MEASURE_EVERY", 2)
    monkeypatch.setattr(script, "report", lambda *_: None)
    script.train("teacher", tasks[1:2], tmp_path / "whole", 5, [4])

    def cut_off(name: str, step: str, *_: Any) -> None:
        if step == "step 2":
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "report", cut_off)
    with pytest.raises(KeyboardInterrupt):
        script.train("teacher", tasks[1:2], tmp_path / "cut", 5, [4])
    assert not (tmp_path / "cut" / "teacher").exists()
    script.train("teacher", tasks[1:2], tmp_path / "cut", 5, [4])
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["teacher"]
    whole, cut = ((tmp_path / name / "teacher" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
