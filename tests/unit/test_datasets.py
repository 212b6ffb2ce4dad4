"""Datasets of the user's own: what OpenRLHF loads is loaded by every command, and what makes no prompt is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skd_plugin import cli
from skd_plugin.config.run import Run
from skd_plugin.errors import RecipeError
from skd_plugin.evaluate.plan import make_plan
from skd_plugin.host.by_task import sources
from skd_plugin.host.prompts import PromptForm
from skd_plugin.host.run_prompts import RunPrompts
from skd_plugin.models import load_tokenizer
from skd_plugin.prepare import prompts
from skd_plugin.prepare.load_run import load_models, load_run
from skd_plugin.prepare.rows import content_digest, read_dataset
from skd_plugin.rollout_command import read_prompts
from skd_plugin.tasks.base import HELD_OUT
from skd_plugin.tasks.label import Label
from tests.recipes import PAIR

ROWS = [{"input": f"tom has {n} coins ."} for n in range(1, 5)]
TEXTS = [row["input"] for row in ROWS]
ENDS = ["tom\u2028has", "tom\u2029has", "tom\x85has"]  # where str.splitlines would begin a new line
CHAT = [{"role": "user", "content": "a"}]
NO_SYSTEM_ROLE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe(dataset, **options of OpenRLHF's data)`: with the dataset for training and for evaluations."""

    def write(dataset: object, student: Path = PAIR / "student", **data: Any) -> Path:
        host = {
            "actor": {"model_name_or_path": str(student)},
            "data": {"prompt_dataset": str(dataset), "max_len": 160, **data},
            "eval": {"dataset": str(dataset)},
            "rollout": {"batch_size": 2},
            "train": {"batch_size": 2},
        }
        skd = {
            "teacher": {"model_name_or_path": str(PAIR / "teacher")},
            "rollout": {"max_new_tokens": 96},
            "run_dir": str(tmp_path / "run"),
        }
        path = tmp_path / "own.yaml"
        path.write_text(json.dumps({"openrlhf": host, "skd": skd}))
        return path

    return write


@pytest.fixture
def templated(tmp_path: Path) -> Path:
    """A student whose chat template refuses system messages."""
    folder = tmp_path / "templated"
    folder.mkdir()
    for file in (PAIR / "student").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(NO_SYSTEM_ROLE)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """`file(name, content)`: its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the ending, or as a folder."""
    made = datasets.Dataset.from_list(rows)
    save = {".parquet": made.to_parquet, ".csv": made.to_csv}.get(path.suffix, made.save_to_disk)
    save(str(path))
    return path


# --- what is loaded ---


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("lines.jsonl", lines(*ROWS), TEXTS),
        ("blank.jsonl", lines(*ROWS[:2]) + "\n  \n" + lines(*ROWS[2:]), TEXTS),
        ("mark.jsonl", b"\xef\xbb\xbf" + lines(*ROWS).encode(), TEXTS),
        ("array.json", json.dumps(ROWS, indent=1), TEXTS),
        ("marked_array.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), TEXTS),
        ("ends.jsonl", lines(*({"input": text} for text in ENDS)), ENDS),
        ("escaped.jsonl", '{"input": "tom \\ud83d\\ude00 has"}\n' * 2, ["tom 😀 has"] * 2),
        ("rows.csv", 'input,label\n"tom, 1 .\nann .",x\ntom has 2 .,y\n', ["tom, 1 .\nann .", "tom has 2 ."]),
    ],
)  # fmt: skip
def test_files_of_every_kind(recipe, file, name: str, content: str | bytes, expected: list[str]) -> None:
    own = recipe(file(name, content))
    run = load_run(own)
    assert (run.num_prompts, run.prompts) == (len(expected), expected)
    tokenizer = load_tokenizer(str(PAIR / "student"), "student")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in expected]
    assert [held_out.prompt.ids for held_out in make_plan(str(own), [], [], ["all"]).held_out[0]] == ids
    assert [prompt.ids for prompt in read_prompts(run.host["data.prompt_dataset"], load_models(own), raw=False)] == ids


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "folder", "folder_of_files", "*.jsonl"])
def test_formats_of_datasets(recipe, tmp_path: Path, name: str) -> None:
    if name == "folder_of_files":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines(*ROWS))
    elif name == "*.jsonl":
        (tmp_path / "a.jsonl").write_text(lines(*ROWS[:2]))
        (tmp_path / "b.jsonl").write_text(lines(*ROWS[2:]))
    else:
        saved(tmp_path / name, ROWS)
    assert load_run(recipe(tmp_path / name)).prompts == TEXTS


def test_several_datasets(recipe, file) -> None:
    """One behind the other, or drawn by probabilities as OpenRLHF draws."""
    pair = f"{file('a.jsonl', lines(*ROWS[:2]))}, {file('b.jsonl', lines(*ROWS[2:]))}"
    assert load_run(recipe(pair)).prompts == TEXTS
    drawn = load_run(recipe(pair, prompt_probs="0.5,0.5"))
    assert set(drawn.prompts) == set(TEXTS) and drawn.num_prompts == len(drawn.prompts) >= 4
    assert load_run(recipe(pair, max_samples=3)).prompts == TEXTS[:3]
    for probs in ("0.5", "1,0", "0.5,0.6", "a,b", "nan,nan", "-1,2"):
        with pytest.raises(RecipeError, match=r"prompt_probs is .*, but must be 2 numbers above 0 .* and 1 together"):
            load_run(recipe(pair, prompt_probs=probs))
    with pytest.raises(RecipeError, match="in which a name is empty"):
        load_run(recipe(f"{pair},"))
    file("b.jsonl", lines({"input": None}))
    with pytest.raises(RecipeError, match=r"b\.jsonl, line 1: 'input' is missing or null"):
        load_run(recipe(pair, prompt_probs="0.5,0.5"))


# --- what is refused, with its place ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(*ROWS, {"input": None}), r"a\.jsonl, line 5: 'input' is missing or null, but must"),
        ("a.jsonl", lines(*ROWS, {"label": "x"}), r"a\.jsonl, line 5: 'input' is missing or null"),
        ("a.json", json.dumps([*ROWS, {"input": None}]), r"a\.json, row 5: 'input' is missing or null"),
        ("a.csv", "input,label\na b,1\n,2\n", r"a\.csv, row 2: 'input' is missing or null"),
        ("a.jsonl", lines(*ROWS, {"input": 5}), r"a\.jsonl, line 5: 'input' is 5, but must be a text"),
        ("a.jsonl", lines(*ROWS, {"input": 5}) + "\n" + lines(*ROWS), r"line 6 is empty, .* of several types"),
        ("a.jsonl", lines({"input": 5}, {"input": 6}), r"a\.jsonl, line 1: 'input' is 5, but must be a text$"),
        ("a.jsonl", lines({"input": {"a": 1}}), r"a\.jsonl, line 1: 'input' is \{'a': 1\}, but must be a text"),
        ("a.jsonl", lines({"input": ["a", "b"]}), r"line 1: 'input' is \['a', 'b'\], but must be a text"),
        ("a.jsonl", lines({"input": CHAT}), r"messages want openrlhf\.data\.apply_chat_template=true"),
        ("a.jsonl", lines({"input": "2024-01-01"}), r"'input' is 2024-01-01 00:00:00, .* for dates"),
        ("a.jsonl", lines({"text": "a"}), r"has no column 'input' \(openrlhf\.data\.input_key\); it has text"),
        ("a.jsonl", '{"input": "a"}\n{"input": "b"\n', r"a\.jsonl cannot be read: line 2 is not JSON: .*column \d+"),
        ("a.jsonl", lines(*ROWS, ["a"]), r"cannot be read: line 5 is \[\"a\"\], but a line is one JSON object"),
        ("a.jsonl", '{"input": "a"}\n{"input": "b \\ud800"}\n', r"line 2 has \\ud800 in it, half of a character"),
        ("a.json", '[{"input": "tom has"}, {"input": "tom \\ud800"}]', r"line 1 has \\ud800 in it, half of a"),
        ("a.jsonl", '{"input": "a", "input": "b"}', r"line 1: the key 'input' is there twice"),
        ("a.jsonl", b'{"input": "caf\xe9"}\n', r"line 1 is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", lines(*ROWS).encode("utf-16"), r"line 1 is not UTF-8"),
        ("a.json", '[{"input": "a"},\n {"input": "b"]', r"a\.json cannot be read: line 2 is not JSON"),
        ("a.jsonl", "", r"a\.jsonl cannot be read: the file is empty"),
        ("a.json", "[]", r"a\.json cannot be read: it holds no row"),
        ("a.parquet", b"nonsense", r"a\.parquet cannot be read: Parquet magic bytes not found"),
        ("a.csv", "input,label\na,b,c,d\na,b,c,d,e\n", r"a\.csv cannot be read: Error tokenizing data"),
        ("a.jsonl.gz", gzip.compress(lines(*ROWS).encode()), r"a\.jsonl\.gz cannot be read: Couldn't find"),
    ],
)  # fmt: skip
def test_rows_that_make_no_prompt(
    recipe, file, capsys, monkeypatch, name: str, content: str | bytes, message: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = file(name, content)
    own = recipe(path)
    with pytest.raises(RecipeError, match=message):
        load_run(own)
    with pytest.raises(RecipeError, match=message):
        make_plan(str(own), [], [], ["all"])
    if "no column" not in message:
        with pytest.raises(RecipeError, match=message):
            read_prompts(str(path), load_models(own), raw=False)
    assert cli.main(["check", str(own), "--no-self-test"]) == 2
    table = capsys.readouterr().out
    assert "skd train would refuse it" in table and "the same 179 tokens" in table and "memory (estimate)" in table


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./none.jsonl", r"there is no file .*none\.jsonl$"),
        ("none.parquet", r"there is no file none\.parquet$"),
        ("./none", r"there is no file .*/none, nor a folder"),
        ("/no/such", r"there is no file /no/such, nor a folder"),
        ("org/none", r"org/none cannot be read: .*org/none.* on the Hub"),
        ("a" * 300 + ".json", r"there is no file a+"),
    ],
)
def test_datasets_that_are_not_there(recipe, dataset: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"openrlhf\.data\.prompt_dataset: {message}"):
        load_run(recipe(dataset))


def test_a_split_that_is_not_there(recipe, file) -> None:
    with pytest.raises(RecipeError, match=r"it has no split 'dev' \(openrlhf\.data\.prompt_split, openrlhf\.eval"):
        load_run(recipe(file("a.jsonl", lines(*ROWS)), prompt_split="dev"))


# --- templates ---


def test_messages_that_the_chat_template_refuses(recipe, file, templated: Path) -> None:
    system, user = {"role": "system", "content": "add"}, {"role": "user", "content": "tom has 3 coins ."}
    own = recipe(file("a.jsonl", lines({"input": [user]}, {"input": [user]})), templated, apply_chat_template=True)
    assert load_run(own).prompts == ["<user> tom has 3 coins ."] * 2
    for bad, message in (
        ([system, user], r"the student's chat template makes no prompt of .*: System role not supported"),
        (["a"], r"'input' is \['a'\], but must be a text, or a list of messages"),
        ([], r"'input' is \[\], but must be"),
        ([{"role": "user"}], r".*, but must be a text, or a list of messages like"),
        ({"role": "user", "content": "a"}, ".*, but must be a text, or a list of messages like"),
        (7, r"'input' is 7, but must be"),
    ):
        path = file("a.jsonl", lines({"input": [user]}, {"input": bad}))
        with pytest.raises(RecipeError, match=rf"a\.jsonl, line 2: {message}"):
            load_run(recipe(path, templated, apply_chat_template=True))


def test_a_text_with_the_word_for_an_image(recipe, file, templated: Path) -> None:
    """Which OpenRLHF would make a list of parts of, and lose the spaces around it."""
    path = file("a.jsonl", lines({"input": "say <image> twice"}) * 2)
    assert load_run(recipe(path)).prompts == ["say <image> twice"] * 2
    chat = load_run(recipe(path, templated, apply_chat_template=True))
    assert chat.prompts == ["<user> say <image> twice"] * 2


@pytest.mark.parametrize("template", ["{x}", "{", "{1}", "{0.x}", "say {x}: {}", "{:>9999999999}"])
def test_braces_in_a_template(recipe, file, template: str) -> None:
    with pytest.raises(
        RecipeError, match=r"input_template is .*, in which only \{\} is a place, for the prompt; write"
    ):
        load_run(recipe(file("a.jsonl", lines(*ROWS)), input_template=template))


def test_templates(recipe, file, templated: Path) -> None:
    path = file("a.jsonl", lines({"input": "tom {} has {x}"}) * 2)
    assert load_run(recipe(path, input_template="{{q}} {}")).prompts == ["{q} tom {} has {x}"] * 2
    with pytest.raises(
        RecipeError, match=r"input_template is .*, but must have one \{\}, where the prompt goes: without"
    ):
        load_run(recipe(path, input_template="Answer"))
    with pytest.raises(
        RecipeError, match=r"input_template = '\{\}' has no effect: the chat template makes the prompts"
    ):
        load_run(recipe(path, templated, input_template="{}", apply_chat_template=True))


# --- labels and sources ---


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)
    )
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_label_of_the_users_is_never_ours(value: Any) -> None:
    for record in (value, {"task": "arithmetic", "answer": "4", "sampling": {"top_k": 1}, "x": value}):
        label = Label.parse(json.dumps(record))
        assert label.task is None and label.checker() is None and label.sampling == (None, None)


@pytest.mark.parametrize("label", ["[" * 100_000, '{"task": ' + "1" * 5000 + "}", '{"reference": {}}', "\ud800", 4])
def test_labels_that_are_hard_to_read(label: object) -> None:
    assert Label.parse(label).task is None and Label.parse(label).reference in (None, label)


def test_half_of_a_character_is_no_reference() -> None:
    assert Label.parse('{"reference": "a \\ud800"}').reference is Label.parse("\ud800").reference is None


def test_own_labels_in_an_evaluation(recipe, file) -> None:
    own = {"label": json.dumps({"task": "math", "answer": "42"})}
    path = file("a.jsonl", lines(*({**row, **own} for row in ROWS)))
    (held_out,) = make_plan(str(recipe(path, label_key="label")), [], [], ["all"]).held_out
    assert {one.label for one in held_out} == {Label(own["label"])}


def test_sources_of_some_rows_only(recipe, file) -> None:
    path = file("a.jsonl", lines(ROWS[0], {**ROWS[1], "datasource": "x"}, {**ROWS[2], "datasource": None}))
    (held_out,) = make_plan(str(recipe(path)), [], [], ["all"]).held_out
    assert [one.task for one in held_out] == [HELD_OUT, "x", HELD_OUT]
    assert list(sources(in_the_controller(recipe(path))).values()) == [HELD_OUT, "x", HELD_OUT]


# --- the same prompts in the run ---


def in_the_controller(own: Path) -> RunPrompts:
    """OpenRLHF's dataset of the training prompts, as its `prepare_datasets` makes it."""
    models = load_models(own)
    options = models.options
    names = ("input_key", "label_key", "input_template", "apply_chat_template", "image_key")
    data = SimpleNamespace(**{name: options[f"data.{name}"] for name in names})
    strategy = SimpleNamespace(args=SimpleNamespace(data=data, skd=models.skd), is_rank_0=lambda: False)
    rows = read_dataset(options["data.prompt_dataset"], option="o", split="train", limit=9).whole.rows
    return RunPrompts(rows, models.tokenizer, strategy, input_template=options["data.input_template"])


def test_prompts_of_the_run_are_those_that_were_checked(recipe, file, templated: Path) -> None:
    path = file("a.jsonl", lines(*ROWS, {"input": "a <image> b", "label": "x"}))
    for own in (
        recipe(path, label_key="label"),
        recipe(path, input_template="say {} now"),
        recipe(path, templated, apply_chat_template=True),
    ):
        found = in_the_controller(own)
        assert found.prompts == list(load_run(own).prompts) and len(found) == 5
        assert found.labels[-1] == ("x" if found.labels[0] is None else "")
        assert found[0] == ("default", found.prompts[0], found.labels[0], None)


def test_a_row_that_was_not_looked_at(recipe, file) -> None:
    own = recipe(file("a.jsonl", lines(*ROWS, {"input": None})))
    with pytest.raises(
        RuntimeError, match="row 5 of the prompts: 'input' is missing or null, but must be a text; take"
    ):
        in_the_controller(own)


# --- large ones ---


def test_of_a_large_dataset_every_row_and_the_extremes_are_looked_at(recipe, file, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "PROMPTS_CHECKED", 10)
    monkeypatch.setattr(prompts, "EXTREMES", 2)
    many = [{"input": f"tom has {n} coins ."} for n in range(97)]
    made: list[str] = []
    make = PromptForm.prompt
    monkeypatch.setattr(PromptForm, "prompt", lambda form, row: made.append(row["input"]) or make(form, row))
    monkeypatch.setattr("skd_plugin.prepare.load_run.PROMPTS_KEPT", 0)
    run = load_run(recipe(file("a.jsonl", lines(*many))))
    assert run.num_prompts == 97 and len(made) == 2 * len(set(made)) <= 2 * 14  # training and held-out are the same
    for place in (1, 50, 96):
        for bad, message in (
            ("tom " * 90, r"has 9\d tokens, but 2 to 64 fit"),
            ("a", "has 1 tokens"),
            (None, ": 'input'"),
        ):
            rows = [*many[:place], {"input": bad}, *many[place:]]
            with pytest.raises(RecipeError, match=rf"a\.jsonl, line {place + 1}:? ?{message}"):
                load_run(recipe(file("a.jsonl", lines(*rows))))


# --- digest ---


def digest_of(path: Path) -> str:
    return content_digest([read_dataset(str(path), option="o", split="train", limit=100)], ["input", "label"])


def test_digest_is_of_the_rows_that_are_read(file, tmp_path: Path) -> None:
    rows = [{"input": f"tom {n}", "label": None if n % 3 else str(n)} for n in range(30)]
    digest = digest_of(file("a.jsonl", lines(*rows)))
    same = [
        file("b.json", json.dumps(rows)),
        file("c.jsonl", lines(*({**row, "note": "unread"} for row in rows))),
        saved(tmp_path / "d.parquet", rows),
        saved(tmp_path / "e", rows),
    ]
    assert [digest_of(path) for path in same] == [digest] * 4
    changed = [
        [*rows[:-1], {"input": "tom", "label": None}],
        [*rows[:-1], {**rows[-1], "label": "1"}],
        rows[:-1],
        rows[::-1],
    ]
    others = [digest_of(file(f"{n}.jsonl", lines(*content))) for n, content in enumerate(changed)]
    assert len({digest, *others}) == 5


@pytest.mark.parametrize("name", ["own.parquet", "folder"])
def test_replaced_data_are_another_run(recipe, tmp_path: Path, name: str) -> None:
    """Whatever its file or folder says of itself; held-out prompts too."""
    own = recipe(saved(tmp_path / name, ROWS))

    def load() -> Run:
        return load_run(own)

    digest = load().data_digest
    assert load().data_digest == digest
    saved(tmp_path / name, [*ROWS[:-1], {"input": "another one ."}])
    assert load().data_digest != digest
    saved(tmp_path / name, ROWS)
    assert load().data_digest == digest
    held_out = saved(tmp_path / f"held_{name}", ROWS[:1])
    assert load_run(own, [f"openrlhf.eval.dataset={held_out}"]).data_digest != digest


# --- any text ---


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_any_text_is_read_as_it_is(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "any.jsonl"
    rows = [{"input": f"q {text}"} for text in texts]
    for ascii_only in (True, False):
        path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
        found = read_dataset(str(path), option="o", split="train", limit=9).whole.rows
        assert list(found["input"]) == [row["input"] for row in rows]
