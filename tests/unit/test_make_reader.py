"""The pieces of scripts/make_reader.py, and the task of recipes/self-distillation.yaml; the training is not run."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    before = list(sys.path)  # the script adds recipes/
    try:
        spec = importlib.util.spec_from_file_location("make_reader", ROOT / "scripts" / "make_reader.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def test_walks_follow_the_line(script: ModuleType) -> None:
    found = script.walks(["ink", "egg", "map", "jar", "pen"], [3, 0])
    assert found == ("from jar , ink .", " jar pen ink egg , ink egg map jar .", "egg jar")
    assert script.around(["ink", "egg", "map"], 1) == "egg map ink egg"
    task = script.Line()
    assert task.score(found.reference, "egg jar") == 1 and task.score(" egg , ink jar .", "egg jar") == 1
    assert [task.score(text, "egg jar") for text in ("", " , .", " jar egg .", " egg , egg .")] == [0.0] * 4
    right = " milk pen bed cup , ink milk pen bed ."
    assert task.metrics([right], ["cup bed"]) == {"stops": 1.0} and task.metrics([""], ["cup"]) == {"stops": 0.0}
    assert task.metrics([right, " milk bed pen"], ["cup bed", "pen"]) == {"stops": 0.75}


def test_what_helps_is_read_token_by_token(script: ModuleType) -> None:
    tokenizer, rng = script.make_tokenizer([script.Line()]), random.Random(0)
    for template in script.BATCH:
        drawn = [script.draw(rng, template) for _ in range(200)]
        for prompt, reference, _ in drawn + script.Helped(template).examples("test", 50):
            ids = tokenizer(prompt + reference).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == prompt + reference
    for example in script.Line().examples("train", 500):
        assert len(tokenizer(example.reference).input_ids) + 1 <= script.Line.max_new_tokens


def test_the_recipes_teacher_gets_what_the_reader_was_trained_on(script: ModuleType) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "self-distillation.yaml").read_text())
    assert recipe["skd"]["teacher"]["prompt"]["template"] == script.SOLUTION
    methods = yaml.safe_load((ROOT / "recipes" / "compare" / "teacher-prompts.yaml").read_text())["methods"]
    told = {name: methods[name]["set"]["skd.teacher.prompt"]["template"] for name in ("rule", "answer")}
    assert told == {"rule": script.RULE.replace("{line}", script.around(script.LINE)), "answer": script.ANSWER}
