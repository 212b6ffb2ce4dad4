"""Tasks that read a dataset: rows of the Hub's columns from local files, and what is asked of the Hub."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from skd_plugin.tasks import DATASETS, TASKS, TaskError
from skd_plugin.tasks.base import split_of
from skd_plugin.tasks.dataset import DatasetTask
from skd_plugin.tasks.label import Label

FORM = (
    "Solve the following math problem step-by-step.\nSimplify your answer as much as possible. Present your final "
    "answer as \\boxed{Your Answer}.\n"
)
CHAT = "#Person1#: Hi {there}.\n#Person2#: Hello."
# name -> a row as the Hub has it, its prompt, its reference, a right response, a wrong one
ROWS: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "gsm8k": (
        {"question": "How many?", "answer": "9 * 8 = <<9*8=72>>72\n#### 72"},
        "Q: How many? \n\nA:", "9 * 8 = <<9*8=72>>72\n#### 72", "so\n#### 72.0", "it is 72",
    ),
    "flores": (
        {"sentence_asm_Beng": "মই যাওঁ", "sentence_eng_Latn": "I go home now."},
        "Translate Assamese sentence into English. This is the Assamese sentence: মই যাওঁ Here is the English "
        "translation:", "I go home now.", " I go home now.\n", "He went.",
    ),
    "multi30k": (
        {"en": "A dog runs.", "de": "Ein Hund rennt."},
        "Translate English sentence into German. This is the English sentence: A dog runs. Here is the German "
        "translation:", "Ein Hund rennt.", " Ein Hund rennt.\n", "Zwei Katzen.",
    ),
    "dialogsum": ({"dialogue": CHAT, "summary": "They greet."}, CHAT, "They greet.", "they greet", "They part."),
    "ultrainteract": (
        {"task": "Math_CoT", "instruction": FORM + "1/4 + 1/4?", "response": r"Step 1: \boxed{\frac{1}{2}}"},
        FORM + "1/4 + 1/4?", r"Step 1: \boxed{\frac{1}{2}}", r"\boxed{0.5}", "0.5",
    ),
    "math500": (
        {"problem": "What?", "solution": r"It is $\boxed{\frac{3}{4}}$.", "answer": r"\frac{3}{4}"},
        FORM + "What?", r"It is $\boxed{\frac{3}{4}}$.", r"\boxed{3/4}", r"\boxed{4/3}",
    ),
    "gsm_plus": (
        {"question": "How many?", "solution": "It is 12.", "answer": "12"},
        FORM + "How many?", "It is 12.", r"\boxed{12}", r"\boxed{21}",
    ),
    "asdiv": (
        {"body": "Two and seven.", "question": "How many?", "answer": "9 (apples)"},
        FORM + "Two and seven. How many?", r"\boxed{9}", r"\boxed{9}", r"\boxed{8}",
    ),
}  # fmt: skip


def write(folder: Path, split: str, rows: list[dict[str, Any]], ending: str = ".jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}{ending}"
    if ending == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", DATASETS, ids=lambda kind: kind.name)
def test_rows_become_examples(kind: type[DatasetTask], tmp_path: Path) -> None:
    row, prompt, reference, right, wrong = ROWS[kind.name]
    split = split_of(prompt) if kind.cut_by_hash else "test"
    folder = write(tmp_path / "data", "train" if kind.cut_by_hash else "test", [row])
    task = kind(path=str(folder))
    (example,) = task.examples(split, None)
    assert (example.prompt, example.reference) == (prompt, reference)
    assert task.score(right, example.label) == 1.0 and 0 <= task.score(wrong, example.label) < 1
    assert task.metrics([right], [example.label]) == pytest.approx(
        dict.fromkeys(task.metrics([right], [example.label]), 1)
    )


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_number_order_and_distinctness(tmp_path: Path, ending: str) -> None:
    rows = [{"question": f"q{n % 40}", "answer": f"#### {n % 40}"} for n in range(60)]
    task = TASKS["gsm8k"](path=str(write(tmp_path / ending, "train", rows, ending)))
    everything = task.examples("train", None, seed=3)
    assert len(everything) == len({e.prompt for e in everything}) == 40
    assert task.examples("train", 10, seed=3) == everything[:10] != task.examples("train", 10, seed=4)
    with pytest.raises(TaskError, match="gsm8k has 40 train prompts, but 41 are asked for"):
        task.examples("train", 41)
    with pytest.raises(TaskError, match=r"has no test\.json, test\.jsonl or test\.parquet"):
        task.examples("test", 1)


def test_template_of_the_recipe(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "d", "test", [{"question": "Why?", "answer": "#### 1"}]))
    assert TASKS["gsm8k"](folder, "Question: {question}").examples("test", 1)[0].prompt == "Question: Why?"
    assert TASKS["gsm8k"](folder).examples("test", 1)[0].prompt == "Q: Why? \n\nA:"
    with pytest.raises(TaskError, match=r"row 1 of test: .* no column 'text' of gsm8k's prompt; it has question, "):
        TASKS["gsm8k"](folder, "{text}").examples("test", 1)
    for template in ("{", "Q: {question", "{question:>9999999999}", "{}"):
        with pytest.raises(TaskError, match=r"skd\.task\.template is .* only names of columns|no column ''"):
            TASKS["gsm8k"](folder, template).examples("test", 1)
    assert TASKS["gsm8k"](folder, "{{x}} {question}").examples("test", 1)[0].prompt == "{x} Why?"


def test_rows_that_are_wrong_or_of_no_use(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "d", "test", [{"question": "Why?", "solution": "1"}]))
    with pytest.raises(TaskError, match="a row has no column 'answer'; it has question, solution"):
        TASKS["gsm8k"](folder).examples("test", 1)
    folder = str(write(tmp_path / "e", "test", [{"question": "Why?", "answer": "42"}]))
    with pytest.raises(TaskError, match="has no answer behind ####: '42'"):
        TASKS["gsm8k"](folder).examples("test", 1)
    right = {"question": "Why?", "answer": "#### 42"}
    for bad, message in (({"question": None}, "'question' of gsm8k's prompt is"), ({"answer": None}, "'answer' is")):
        folder = str(write(tmp_path / "g", "test", [right, {**right, **bad}]))
        with pytest.raises(TaskError, match=f"/g, row 2 of test: {message} missing or null"):
            TASKS["gsm8k"](folder).examples("test", None)
    (tmp_path / "g" / "test.jsonl").write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "caf\xe9"}')
    with pytest.raises(TaskError, match=r"g/test\.jsonl cannot be read: line 2 is not UTF-8"):
        TASKS["gsm8k"](folder).examples("test", None)
    (tmp_path / "g" / "test.jsonl").write_text("")
    with pytest.raises(TaskError, match=r"g/test\.jsonl cannot be read: the file is empty"):
        TASKS["gsm8k"](folder).examples("test", None)
    rows = [{"question": "a", "solution": "", "answer": "None"}, {"question": "b", "solution": "", "answer": "3"}]
    kept = TASKS["gsm_plus"](str(write(tmp_path / "f", "test", rows))).examples("test", None)
    assert [e.label for e in kept] == ["3"]


def test_ultrainteract_is_cut_in_two_by_a_hash(tmp_path: Path) -> None:
    rows = [{"task": "Math_CoT", "instruction": f"{n}", "response": rf"\boxed{{{n}}}"} for n in range(400)]
    rows += [{"task": "Coding", "instruction": "code", "response": r"\boxed{1}"}]
    rows += [{"task": "Math_CoT", "instruction": "no answer", "response": "1"}]
    task = TASKS["ultrainteract"](str(write(tmp_path / "d", "train", rows)))
    train, test = ({e.prompt for e in task.examples(split, None)} for split in ("train", "test"))
    assert not train & test and train | test == {str(n) for n in range(400)} and 20 < len(test) < 80


def test_the_best_of_three_summaries_counts(tmp_path: Path) -> None:
    rows = [{"dialogue": "d", "summary": text} for text in ("a b c d", "e f", "g")]
    task = TASKS["dialogsum"](str(write(tmp_path / "d", "test", rows)))
    (example,) = task.examples("test", None)
    assert example.reference == "a b c d"
    assert [task.score(text, example.label) for text in ("g", "e f", "e")] == pytest.approx([1, 1, 2 / 3])


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flores has a file a language, whose sentences are paired by id."""
    asked: list[tuple[Any, ...]] = []
    texts = {"asm_Beng": {1: "ek", 2: "dui", 3: "tini"}, "eng_Latn": {3: "three", 1: "one"}}

    def load(name: str, subset: str | None = None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        if name == "openai/gsm8k":
            return [ROWS["gsm8k"][0]]
        return [{"id": key, "text": text} for key, text in texts[str(subset)].items()]

    monkeypatch.setattr(datasets, "load_dataset", load)
    TASKS["gsm8k"]().examples("test", 1)
    pairs = TASKS["flores"]().examples("train", None)
    assert {(e.prompt.split()[10], e.reference) for e in pairs} == {("ek", "one"), ("tini", "three")}
    flores = "openlanguagedata/flores_plus"
    assert asked == [("openai/gsm8k", "main", "test"), (flores, "asm_Beng", "dev"), (flores, "eng_Latn", "dev")]
    with pytest.raises(TaskError, match="math500 has no train prompts: it is for test only"):
        TASKS["math500"]().examples("train", 1)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        TaskError, match=r"gsm8k cannot be loaded .*: Couldn't reach the Hub and more\. Log in .* skd\.task\.path"
    ):
        TASKS["gsm8k"]().examples("test", 1)


def test_what_comet_is_given(tmp_path: Path) -> None:
    """COMET itself cannot be installed here; its input is source, translation and reference of every trace."""
    script = Path(__file__).parents[2] / "scripts" / "score_comet.py"
    spec = importlib.util.spec_from_file_location("score_comet", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = write(
        tmp_path / "d", "test", [{"sentence_asm_Beng": f"a{n}", "sentence_eng_Latn": f"e{n}"} for n in (1, 2)]
    )
    rows = [
        {"input": e.prompt, "label": Label(e.reference, "flores", e.label, "</s>").to_json()}
        for e in TASKS["flores"](str(folder)).examples("test", None)
    ]
    write(tmp_path / "run", "test", rows)
    prompts = sorted(row["input"] for row in rows)
    write(tmp_path / "run", "train", [{"prompt": f"<user>{p}<end>", "response": " mt\n"} for p in prompts])
    test, traces = (tmp_path / "run" / f"{split}.jsonl" for split in ("test", "train"))
    wanted = [{"src": f"a{n}", "mt": "mt", "ref": f"e{n}"} for n in (1, 2)]
    assert module.triples(test, traces) == wanted
    write(tmp_path / "run", "train", [{"prompt": "another", "response": ""}])
    with pytest.raises(SystemExit, match=r"no prompt of .* is in 'another'"):
        module.triples(test, traces)
