"""`skd report`: what is read, what is packed, what the page says, and that no text of a run acts in it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skd_plugin.cli import main
from skd_plugin.core.methods import METHODS
from skd_plugin.report import tables
from skd_plugin.report.curves import metrics_of, shown_first
from skd_plugin.report.page import ASSETS, render
from skd_plugin.report.pieces import Pieces, load_pieces
from skd_plugin.report.run_record import read_runs
from skd_plugin.report.traces import corrections, pack_traces
from tests.run_folder import (
    COINS,
    FOUR,
    HAS,
    LOST,
    NEWLINE,
    SEVEN,
    THE,
    TOM,
    WORDS,
    lines,
    three_steps,
    trace,
    two_traces,
    write_run,
    write_tokenizer,
)

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}\u2028'


class Page(HTMLParser):
    """Elements and attributes of a page, the text of its scripts, and what a reader sees of the rest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data + " "
        elif self._inside[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))

    def data(self, id_: str) -> str:
        return next(text for attributes, text in self.scripts if attributes.get("id") == id_)


class Blob:
    """The packed traces, read as the page reads them."""

    def __init__(self, text: str) -> None:
        raw = gzip.decompress(base64.b64decode(text))
        length = int(np.frombuffer(raw, "<u4", 1)[0])
        self.header = json.loads(raw[4 : 4 + length])
        self._columns = raw[4 + length :]

    def __getitem__(self, name: str) -> list:
        kind, offset, count = self.header["columns"][name]
        return np.frombuffer(self._columns, np.dtype(kind).newbyteorder("<"), count, offset).tolist()

    def texts(self, name: str) -> list:
        return [self.header["pieces"][place - 1][1] if place else None for place in self[name]]


def report(tmp_path: Path, *runs: Path, status: int = 0, options: tuple[str, ...] = ()) -> Page:
    out = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out), *options]) == status
    return Page(out)


# ---- reading


def test_curves_are_every_number_and_a_step_counts_as_it_was_last(tmp_path):
    records = [{"step": 1, "a": 1.0}, {"step": 3, "a": 3.0, "b": None, "ok": True}, {"step": 2, "a": 9.0}]
    records += [{"step": 2, "a": 2, "text": "x"}, {"a": 5.0}]
    (run,) = read_runs([write_run(tmp_path / "run", metrics=records)])
    assert run.curves == {"a": ([1, 2, 3], [1.0, 2.0, 3.0])}
    assert run.steps == 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "traces.jsonl"])
def test_a_half_written_last_line_is_left_out_and_said(tmp_path, name):
    run = write_run(tmp_path / "run")
    with (run / name).open("a") as file:
        file.write('{"step": 4, "skd/lo')
    last = (run / name).read_text().count("\n") + 1
    page = report(tmp_path, run)
    assert f"{name}: 1 line left out: half written (line {last})." in page.text
    assert "3 steps" in page.text and "2 sampled responses" in page.text


def test_unreadable_lines_in_the_middle_are_counted(tmp_path):
    run = write_run(tmp_path / "run")
    text = (run / "traces.jsonl").read_text()
    (run / "traces.jsonl").write_bytes(b"{oops}\n\n[1]\n\xff\n" + text.encode())
    page = report(tmp_path, run)
    assert "traces.jsonl: 3 lines left out: no record of JSON (line 1, 3, 4)." in page.text
    assert "2 sampled responses" in page.text


def test_traces_with_missing_or_uneven_fields_are_left_out(tmp_path):
    short, letter = trace([TOM, COINS], kl=[0.1]), trace([TOM], source="x")
    lacking = trace([TOM])
    del lacking["kl"]
    page = report(tmp_path, write_run(tmp_path / "run", traces=[short, lacking, letter, trace([THE])]))
    assert "1 sampled responses" in page.text
    for line, fault in enumerate(
        ["kl is not as long as response_ids", "kl is missing", "source has unknown letters such as 'x'"], start=1
    ):
        assert f"traces.jsonl: 1 response left out: {fault} (line {line})." in page.text


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["metrics.jsonl"], ["There is no metrics.jsonl", "No step has been logged yet.", "2 sampled responses"]),
        (["traces.jsonl"], ["There is no traces.jsonl", "This report holds no responses.", "Loss"]),
        (["config.yaml"], ["There is no config.yaml", "2 sampled responses", "Loss"]),
        (["status.json"], ["unfinished (stage unknown)"]),
        (["config.yaml", "metrics.jsonl"], ["There is no config.yaml", "There is no metrics.jsonl"]),
        (["metrics.jsonl", "traces.jsonl"], ["no curves", "no responses", "some/teacher"]),
    ],
)
def test_a_page_is_made_of_what_there_is(tmp_path, missing, said):
    run = write_run(tmp_path / "run")
    for name in missing:
        (run / name).unlink()
    text = report(tmp_path, run).text
    for part in said:
        assert part in text


def test_empty_and_broken_files(tmp_path):
    run = write_run(tmp_path / "run", metrics=[], traces=[])
    (run / "config.yaml").write_text("a: [")
    text = report(tmp_path, run).text
    assert "metrics.jsonl is empty" in text and "config.yaml cannot be read" in text


def test_wrong_command_lines_exit_with_2_and_say_what_to_do(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "there is no run folder"),
        ([str(tmp_path / "empty")], "is not a run folder: it holds none of config.yaml"),
        ([str(run / "config.yaml")], "is not a run folder"),
        ([str(run), f"{run}/../run"], "is named twice"),
        ([str(run), "--out", str(tmp_path)], "is a folder; name the file"),
        ([str(run), "--traces", "-1"], "--traces is -1"),
    ]:
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2


def test_names_tell_folders_apart(tmp_path):
    for place in ("a/run", "b/run", "other"):
        write_run(tmp_path / place)
    assert [run.name for run in read_runs([tmp_path / "a/run", tmp_path / "other"])] == ["run", "other"]
    assert [run.name for run in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == ["a/run", "b/run"]


# ---- damaged folders: what can be shown is shown, the rest is said


def metrics_of_step(step: object = 4, **values: object) -> str:
    return json.dumps({"step": step, "my/own": 8.0} | values)


def a_trace(**fields: object) -> str:
    return json.dumps(trace([TOM, HAS]) | fields)


# What a third line of traces.jsonl may be -> what a note says of it, and responses that are shown.
RESPONSES = [
    (a_trace(prompt=5), "1 prompt left out: it is no text; its tokens are here (line 3)", 3),
    (a_trace(prompt=[{"role": "user", "content": "x"}]), "1 prompt left out: it is no text", 3),
    (a_trace(response=None), "1 response left out: it is no text; its tokens are here (line 3)", 3),
    (a_trace(kl=[float("inf"), float("nan")]), "1 number left out: infinite, NaN or too large", 3),
    (a_trace(kl=[10**30, 10**40]), "1 number left out: infinite, NaN or too large", 3),
    (a_trace(kl="1e400").replace('"1e400"', "[1e400, 1.0]"), "1 number left out: infinite, NaN or too large", 3),
    (a_trace(kl=["a", 1.0]), "1 response left out: kl holds something that is neither a number nor null", 2),
    (a_trace(kl=[True, 1.0]), "kl holds something that is neither a number nor null", 2),
    (a_trace(student_logp=None), "student_logp is no list", 2),
    (a_trace(teacher_logp={"0": 1}), "teacher_logp is no list", 2),
    (a_trace(student_entropy=[0.1]), "student_entropy is not as long as response_ids", 2),
    (a_trace(response_ids=None), "response_ids is no list", 2),
    (
        a_trace(response_ids=["1", "2"]),
        "response_ids holds something that is no whole number from 0 to 2,147,483,647",
        2,
    ),
    (
        a_trace(response_ids=[1.5, 2]),
        "response_ids holds something that is no whole number from 0 to 2,147,483,647",
        2,
    ),
    (
        a_trace(response_ids=[True, 2]),
        "response_ids holds something that is no whole number from 0 to 2,147,483,647",
        2,
    ),
    (a_trace(response_ids=[-5, 2]), "response_ids holds something that is no whole number from 0 to 2,147,483,647", 2),
    (
        a_trace(response_ids=[10**30, 2]),
        "response_ids holds something that is no whole number from 0 to 2,147,483,647",
        2,
    ),
    (
        a_trace(rejected_ids=[-2, 2]),
        "rejected_ids holds something that is no whole number from -1 to 2,147,483,647",
        2,
    ),
    (a_trace(draft_rank=[None, 2]), "draft_rank holds something that is no whole number from -1 to 2,147,483,647", 2),
    (a_trace(source="s"), "source is not as long as response_ids", 2),
    (a_trace(source=["s", "s"]), "source is no text", 2),
    (a_trace(source="s\u2028"), "source has unknown letters such as '\\u2028'", 2),
    (a_trace(teacher_topk_ids=None), "teacher_topk_ids is no list", 2),
    (a_trace(teacher_topk_ids=[None, None]), "teacher_topk_ids holds something that is no list", 2),
    (a_trace(teacher_topk_ids=[[None] * 3] * 2), "teacher_topk_ids holds something that is no whole number", 2),
    (a_trace(teacher_topk_logp=[[0.0] * 2] * 2), "teacher_topk_ids and teacher_topk_logp differ in length", 2),
    (a_trace(teacher_topk_logp=[[0.0, "x", 0.0]] * 2), "teacher_topk_logp holds something that is neither", 2),
    (a_trace(step=None), "step is no whole number from 0 to 4,294,967,295", 2),
    (a_trace(step=-1), "step is no whole number from 0 to 4,294,967,295", 2),
    (a_trace(step=10**30), "step is no whole number from 0 to 4,294,967,295", 2),
    ("{}", "1 response left out: response_ids is missing", 2),
    ("[" * 5000, "1 line left out: no record of JSON", 2),
    ("9" * 5000, "1 line left out: no record of JSON", 2),
    ("null", "1 line left out: no record of JSON", 2),
]


@pytest.mark.parametrize(("line", "note", "shown"), RESPONSES)
def test_a_damaged_response(tmp_path, line, note, shown):
    run = write_run(tmp_path / "run")
    with (run / "traces.jsonl").open("a") as file:
        file.write(f"{line}\n")
    page = report(tmp_path, run)
    assert f"traces.jsonl: 1 {note}" in page.text or f": {note}" in page.text
    assert "(line 3)" in page.text
    blob = Blob(page.data("trace-data"))
    assert f"{shown} sampled responses" in page.text and len(blob["trace.length"]) == shown
    assert blob["trace.length"][:2] == [6, 3]
    assert all(map(math.isfinite, [*blob["trace.meanKl"], *blob["trace.maxKl"]]))


def test_texts_and_numbers_at_the_edge_of_what_a_page_takes(tmp_path):
    half = "\ud83d"
    last = dict(step=2**32 - 1, draft_rank=[2**31 - 1, -1], response_ids=[2**31 - 1, 0], kl=[1e30, -1e30])
    records = [trace([TOM, HAS], prompt=half, response="\U0001f600", **last), trace([])]
    page = report(tmp_path, write_run(tmp_path / "run", traces=records))
    blob = Blob(page.data("trace-data"))
    assert blob["trace.step"] == [2**32 - 1, 1] and blob["trace.length"] == [2, 0]
    assert blob["rank"] == [2**31, 0] and blob.texts("token") == ["<2147483647>", "</s>"]
    assert blob["trace.maxKl"] == pytest.approx([1e30, 0])
    assert [blob.header["strings"][place] for place in blob["trace.prompt"]] == ["\ufffd", "how many"]
    assert [blob.header["strings"][place] for place in blob["trace.response"]] == ["\U0001f600", ""]
    assert "left out:" not in page.text


# What a line of metrics.jsonl may be -> what a note says of it.
METRICS = [
    *[
        (metrics_of_step(**{"skd/loss": value}), "value left out: 'skd/loss' is not a number that can be drawn")
        for value in (
            "0.5",
            [0.5],
            {"mean": 0.5},
            True,
            float("nan"),
            float("inf"),
            -float("inf"),
            10**31,
            -(10**400),
            1e300,
        )
    ],
    ('{"step": 4, "my/own": 8.0, "skd/loss": 1e400}', "value left out: 'skd/loss' is not a number that can be drawn"),
    *[
        (metrics_of_step(step), "record left out: step is no whole number from 0 to 4,294,967,295")
        for step in (None, "4", 4.5, True, [4], -4, 10**30, float("nan"))
    ],
    ('{"my/own": 8.0}', "record left out: step is no whole number from 0 to 4,294,967,295"),
    ("[1, 2]", "line left out: no record of JSON"),
    ('{"step": 4, "my/own": 8.0', "line left out: no record of JSON"),
]


@pytest.mark.parametrize(("line", "note"), METRICS)
def test_a_damaged_metric(tmp_path, line, note):
    run = write_run(tmp_path / "run", metrics=three_steps())
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    page = report(tmp_path, run)
    assert f"metrics.jsonl: 1 {note} (line 7)." in page.text
    series = json.loads(page.data("curve-data"))["runs"][0]["series"]
    assert series["skd/loss"] == [[1, 2, 3], [0.3, 0.15, 0.1]]
    own = [[1, 2, 3, 4], [7.0, 7.0, 7.0, 8.0]] if note.startswith("value") else [[1, 2, 3], [7.0] * 3]
    assert series["my/own"] == own


def test_steps_that_do_not_rise_and_times_that_are_negative(tmp_path):
    records = [{"step": step, "time/step": -1.0, "tokens_per_s": 1e30, "skd/loss": 1e30} for step in (3, 1, 2)]
    page = report(tmp_path, write_run(tmp_path / "run", metrics=records))
    (run,) = json.loads(page.data("curve-data"))["runs"]
    assert run["series"]["skd/loss"] == [[1, 2, 3], [1e30] * 3] and run["seconds"] == [[0, 1, 2, 3], [0.0] * 4]
    assert "1e+30" in page.text and "Training time" not in page.text


def test_names_of_metrics_may_be_any_text(tmp_path):
    names = ["", "\ud800", "__proto__", "constructor", "eval/", "eval//", "a\0b", "$\\frac{$", "</script><!--"]
    page = report(tmp_path, write_run(tmp_path / "run", metrics=[{"step": 1} | dict.fromkeys(names, 1.0)]))
    series = json.loads(page.data("curve-data"))["runs"][0]["series"]
    assert set(series) == {*names} - {"\ud800"} | {"\ufffd"}


# A file of the run folder, what is in it (None: it is a folder) -> what the page says.
FILES = [
    ("config.yaml", b"[a, b]", "config.yaml cannot be read: it is no mapping of options."),
    ("config.yaml", b"skd: {1: 2}", "config.yaml cannot be read: line 1, column 7: the key '1' is no text"),
    ("config.yaml", b"skd: {a: \xff}", "config.yaml cannot be read: it is not text in UTF-8 (byte 10)"),
    ("config.yaml", b"skd: &a {b: *a}", "config.yaml cannot be read: line 1: an alias stands for what it is in"),
    ("config.yaml", b'skd: {a: "\\ud800"}', "holds half a character (a surrogate)"),
    ("config.yaml", b"skd: {a: !!int x}", "config.yaml cannot be read: "),
    ("config.yaml", b"", "config.yaml cannot be read: it is no mapping of options."),
    ("config.yaml", b"{}", "3 steps"),
    ("config.yaml", b"skd: {rollout: {method: [skd], gate: [top_k]}, teacher: 5, run_dir: 7}", "3 steps"),
    ("config.yaml", b"openrlhf: {actor: {model_name_or_path: [1]}}\nskd: {teacher: {model_name_or_path: 3}}", "[1]"),
    ("config.yaml", None, "config.yaml is no file: models and settings are unknown."),
    ("status.json", '{"stage": "\U0001f600"}'.encode(), "unfinished (\U0001f600)"),
    ("status.json", rb'{"stage": "\ud83d\ude00"}', "unfinished (\U0001f600)"),
    ("status.json", rb'{"stage": "\ud83d"}', "unfinished (\ufffd)"),
    ("status.json", b'{"stage": "\xff"}', "status.json cannot be read: how far the run is, is unknown."),
    ("status.json", b"[1]", "status.json cannot be read"),
    ("status.json", b"[" * 100_000, "status.json cannot be read"),
    ("status.json", b"", "status.json cannot be read"),
    ("status.json", None, "status.json cannot be read"),
    ("status.json", b'{"stage": ["done"]}', "status.json: the stage is no text, and left out."),
    ("status.json", b'{"planned_steps": 1e400}', "status.json: planned_steps is no number of steps, and left out."),
    ("metrics.jsonl", None, "metrics.jsonl is no file: no curves."),
    ("metrics.jsonl", b"\xff\n", "metrics.jsonl holds nothing that can be shown: no curves."),
    ("traces.jsonl", None, "traces.jsonl is no file: no responses to look at"),
    ("traces.jsonl", b"\0" * 100, "traces.jsonl: 1 line left out: half written (line 1)."),
    ("model/tokenizer.json", b"{}", "tokens are shown as their numbers"),
    ("model/tokenizer.json", b'{"model": 1, "added_tokens": []}', "tokens are shown as their numbers"),
]


@pytest.mark.parametrize(("name", "content", "said"), FILES)
def test_a_damaged_file(tmp_path, name, content, said):
    run = write_run(tmp_path / "run")
    file = run / name
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    page = report(tmp_path, run)
    assert said in page.text
    curves = json.loads(page.data("curve-data"))["runs"][0]["series"]
    assert ("skd/loss" in curves) == (name != "metrics.jsonl")
    assert ("2 sampled responses" in page.text) == (name != "traces.jsonl")


def test_a_folder_whose_only_file_is_a_folder_is_no_run(tmp_path, capsys):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    assert main(["report", str(tmp_path / "run")]) == 2
    assert main(["report", "x" * 300]) == 2
    (tmp_path / "file").touch()
    assert main(["report", str(write_run(tmp_path / "good")), "--out", str(tmp_path / "file" / "x.html")]) == 2
    said = capsys.readouterr().err
    assert "is not a run folder" in said and "there is no run folder" in said and "cannot be written" in said


def test_a_folder_of_a_name_that_is_no_text(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run\udcff", student=write_tokenizer(tmp_path / "student")))
    assert "run\ufffd" in page.text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**400), 2**31, 2**32, 2**53])
    | st.floats()
    | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON: a browser stops at it")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_the_place_of_any_other(tmp_path, data):
    """Reading, packing and rendering raise nothing, and what is not touched is there."""

    def spoilt(value: object) -> object:
        """With one of its parts, or all of it, replaced."""
        parts = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not parts or data.draw(st.integers(0, 3)) == 0:
            return data.draw(json_values)
        part = data.draw(st.sampled_from(parts))
        copy = value.copy()
        copy[part] = spoilt(value[part])
        return copy

    config = {"openrlhf": {"actor": {"model_name_or_path": "/x"}}, "skd": {"rollout": {"method": "skd", "top_k": 3}}}
    files = {
        "metrics.jsonl": [*map(json.dumps, three_steps()), json.dumps(spoilt(three_steps()[2]))],
        "traces.jsonl": [*map(json.dumps, two_traces()), json.dumps(spoilt(two_traces()[0]))],
        "status.json": [json.dumps(spoilt({"stage": "done", "planned_steps": 3}))],
        "config.yaml": [json.dumps(spoilt(config))],
    }
    for name, content in files.items():
        (tmp_path / name).write_text("\n".join(content) + "\n")
    runs = read_runs([tmp_path])
    packed = pack_traces(runs, [Pieces(None)], 100)
    page = tmp_path / "page.html"
    page.write_text(render(runs, packed, []))
    (curves,) = json.loads(Page(page).data("curve-data"), parse_constant=no_constant)["runs"]
    assert {1, 2, 3} <= set(curves["series"]["skd/kl"][0])
    blob = Blob(packed.blob())
    assert len(blob["trace.length"]) in (2, 3) and blob["trace.length"][:2] == [6, 3]


# ---- tokens


def saved(tmp_path: Path, model: dict, decoder) -> Pieces:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(model, unk_token=next(iter(model))))
    tokenizer.decoder = decoder
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "t")
    from transformers import AutoTokenizer

    return Pieces(AutoTokenizer.from_pretrained(tmp_path / "t"))


def test_byte_level_pieces_are_exact_and_parts_of_a_character_are_bytes(tmp_path):
    from tokenizers import decoders

    vocab = {"</s>": 0, "Ġhi": 1, "Ċ": 2, "Ã¤": 3, "Ã": 4, "Ġâ": 5, "<|im_start|>": 6}
    pieces = saved(tmp_path, vocab, decoders.ByteLevel())
    assert [pieces[i] for i in range(6)] == ["</s>", " hi", "\n", "ä", (0xC3,), (0x20, 0xE2)]
    assert pieces.is_special(0) and not pieces.is_special(1)


def test_byte_fallback_and_word_marks(tmp_path):
    from tokenizers import decoders

    vocab = {"</s>": 0, "▁hi": 1, "<0x0A>": 2, "<0xE2>": 3, "x": 4}
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = saved(tmp_path, vocab, decoder)
    assert [pieces[i] for i in range(5)] == ["</s>", " hi", "\n", (0xE2,), "x"]


def test_word_pieces(tmp_path):
    from tokenizers import decoders

    pieces = saved(tmp_path, {"</s>": 0, "play": 1, "##ing": 2}, decoders.WordPiece())
    assert [pieces[1], pieces[2]] == [" play", "ing"]


def test_plain_words_and_ids_that_nobody_knows(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run")])
    pieces = load_pieces(run)
    assert [pieces[i] for i in range(len(WORDS))] == WORDS
    assert pieces[999] == "<999>"
    assert not run.notes


def test_the_students_folder_comes_first_and_the_runs_model_is_the_fallback(tmp_path):
    student = write_tokenizer(tmp_path / "student", ["</s>", "A"])
    (run,) = read_runs([write_run(tmp_path / "run", student=student)])
    write_tokenizer(run.folder.model, ["</s>", "B"])
    assert load_pieces(run)[1] == "A"
    for file in student.iterdir():
        file.unlink()
    assert load_pieces(run)[1] == "B"
    student.rmdir()
    assert load_pieces(run)[1] == "B"


def test_without_a_tokenizer_tokens_are_their_numbers(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run", student=tmp_path / "gone"))
    assert "tokens are shown as their numbers" in page.text
    assert Blob(page.data("trace-data")).texts("token")[:2] == ["<1>", "<2>"]


def test_different_tokenizers_are_said(tmp_path):
    student = write_tokenizer(tmp_path / "student", ["</s>", *reversed(WORDS[1:])])
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", student=student)]
    assert "tokenizers differ" in report(tmp_path, *runs).text
    page = report(tmp_path, runs[0], write_run(tmp_path / "c"))
    assert "tokenizers differ" not in page.text


# ---- packing


def test_packed_traces_say_what_the_file_says(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    blob = Blob(page.data("trace-data"))
    first, second = two_traces()
    ids = first["response_ids"] + second["response_ids"]
    assert blob.texts("token") == [WORDS[id_] for id_ in ids]
    assert blob["source"] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert blob.texts("rejected") == [None] * 3 + [WORDS[COINS]] + [None] * 5
    assert blob["rank"] == [1, 1, 1, 5, 1, 1, 1, 1, 1]
    for name, expected in [("student", -math.log(1 / 2)), ("teacher", -math.log(3 / 4)), ("entropy", 0.5)]:
        assert blob[name] == [round(1000 * expected)] * 9
    assert blob["kl"] == [100] * 6 + [500, 250, 0]
    top = np.reshape(np.array(blob.texts("topToken"), dtype=object), (9, 5)).tolist()
    assert top == [[WORDS[id_], WORDS[THE], WORDS[LOST], None, None] for id_ in ids]
    assert np.reshape(blob["topLogp"], (9, 5))[0].tolist() == [288, 2079, 2773, 65535, 65535]
    assert blob["trace.length"] == [6, 3] and blob["trace.step"] == [1, 3] and blob["trace.cutOff"] == [0, 1]
    assert blob["trace.meanKl"] == pytest.approx([0.1, 0.25]) and blob["trace.maxKl"] == pytest.approx([0.1, 0.5])
    assert blob["trace.replaced"] == pytest.approx([1 / 6, 0])
    texts = [blob.header["strings"][place] for place in blob["trace.response"]]
    assert texts == [first["response"], second["response"]]
    assert [blob.header["pieces"][place - 1][1] for place in blob.header["special"]] == ["</s>"]


def test_of_several_teachers_a_response_names_its_own(tmp_path):
    traces = [trace([TOM], teacher="math"), trace([TOM])]
    blob = Blob(report(tmp_path, write_run(tmp_path / "run", traces=traces)).data("trace-data"))
    assert [blob.header["strings"][place] for place in blob["trace.teacherName"]] == ["math", ""]


def test_values_that_do_not_exist_and_values_out_of_range(tmp_path):
    record = trace([TOM, TOM, TOM], kl=[None, 0.2, 99.0], student_logp=[None, -99.0, 1e-7], draft_rank=[-1, 70000, 0])
    blob = Blob(report(tmp_path, write_run(tmp_path / "run", traces=[record])).data("trace-data"))
    assert blob["kl"] == [65535, 200, 65534]
    assert blob["student"] == [65535, 65534, 0]
    assert blob["rank"] == [0, 70001, 1]
    assert blob["trace.meanKl"] == pytest.approx([49.6]) and blob["trace.maxKl"] == pytest.approx([99.0])


def test_pieces_that_do_not_occur_are_not_stored(tmp_path):
    record = trace([TOM], teacher_topk_ids=[[TOM]], teacher_topk_logp=[[-0.1]])
    blob = Blob(report(tmp_path, write_run(tmp_path / "run", traces=[record])).data("trace-data"))
    assert blob.header["pieces"] == [[TOM, WORDS[TOM]]]


def test_only_so_many_traces_evenly_spread(tmp_path):
    records = [trace([TOM], step=step) for step in range(10)]
    page = report(tmp_path, write_run(tmp_path / "run", traces=records), options=("--traces", "4"))
    steps = Blob(page.data("trace-data"))["trace.step"]
    assert len(steps) == 4 and steps[0] == 0 and np.diff(steps).min() >= 2
    assert "4 of the 10 traces are here" in page.text
    assert "no responses" in report(tmp_path, tmp_path / "run", options=("--traces", "0")).text


def test_five_thousand_traces_stay_a_few_megabytes(tmp_path):
    """Random values, which pack worse than those of a run."""
    generator = np.random.default_rng(0)

    def record(index: int) -> dict:
        ids = generator.integers(0, len(WORDS), 64).tolist()
        logp = np.log(generator.dirichlet([0.3] * 6, 64)).clip(-60)
        values = dict(teacher_logp=logp[:, 0].tolist(), kl=(-logp[:, 1]).tolist(), student_logp=logp[:, 2].tolist())
        return trace(ids, {5: THE}, teacher_topk_logp=logp[:, :3].tolist(), prompt=f"prompt {index}", **values)

    (run,) = read_runs([write_run(tmp_path / "run", traces=[record(i) for i in range(500)])])
    assert 10 * len(pack_traces([run], [load_pieces(run)], 5000).blob()) < 10e6


def test_corrections_count_what_was_rejected_for_what(tmp_path):
    same = trace([TOM], rejected={0: TOM})  # the replacement may equal the proposal: nothing was corrected
    records = [trace([FOUR, THE], {0: SEVEN}), trace([FOUR, NEWLINE], {0: SEVEN, 1: COINS}), same]
    runs = read_runs([write_run(tmp_path / "a", traces=records), write_run(tmp_path / "b")])
    packed = pack_traces(runs, [load_pieces(run) for run in runs], 100)
    assert corrections(packed, 0, 5) == [("7", " 4", 2), (" coins", "\n", 1)]
    assert corrections(packed, 0, 1) == [("7", " 4", 2)]
    assert corrections(packed, 1, 5) == [(" coins", "7", 1)]
    page = report(tmp_path, tmp_path / "a")
    assert re.search(r"␣coins\s*→\s*↵", page.text)


# ---- what the page says


def test_header_of_a_run(tmp_path):
    text = " ".join(report(tmp_path, write_run(tmp_path / "run")).text.replace("\u00a0", " ").split())
    for part in (
        "run 3 steps",
        "Accuracy 50.0 % from 25.0 %; teacher 100.0 %",
        "Loss 0.1 from 0.3",
        "Acceptance 80.0 % from 60.0 %",
        "Training time 6s 100 response tokens/s",
        "run/model",
        "some/teacher",
        "top_k, K 3",
        "forward_kl",
    ):
        assert part in text, part


def test_a_run_that_goes_on(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "status.json").write_text('{"stage": "training", "planned_steps": 40}')
    assert "3 of 40 steps, unfinished (training)" in report(tmp_path, run).text


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({"method": "skd", "gate": "floor", "threshold": 0.05, "top_k": 25}, "floor, threshold 0.05"),
        ({"method": "skd", "gate": "confident", "threshold": 0.9, "top_k": 5}, "confident, K 5, threshold 0.9"),
        (
            {"method": "mixed_skd", "gate": "confident", "threshold": 0.3, "confidence": "margin", "top_k": 5},
            "confident, K 5, threshold 0.3, by margin",
        ),
        ({"method": "skd", "gate": "ask_again", "top_k": 5}, "ask_again, K 5"),
        ({"method": "supervised", "gate": "top_k", "top_k": 5}, "none: every response is a reference"),
        ({"method": "on_policy", "gate": "top_k", "top_k": 25}, "none: every student token stays (on-policy)"),
        ({"method": "teacher"}, "none: every token is the teacher's"),
        ({"method": "skd", "gate": "a_later_one", "threshold": 0.5, "top_k": 3}, "a_later_one, threshold 0.5"),
        ({"method": "a_later_one", "top_k": 3}, "top_k, K 3"),
        ({"method": "skd", "top_k": 3}, "top_k, K 3"),  # a config.yaml from before there were gates
    ],
)
def test_gate_in_words(tmp_path, rollout, expected):
    (run,) = read_runs([write_run(tmp_path / "run", skd={"rollout": rollout})])
    assert tables.gate(run) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_gate_or_words_for_having_none(tmp_path, method):
    (run,) = read_runs([write_run(tmp_path / "run", skd={"rollout": {"method": method, "top_k": 5}})])
    assert tables.gate(run) == "top_k, K 5" if METHODS[method].has_gate else tables.gate(run).startswith("none: ")


def test_loss_in_words(tmp_path):
    two_terms = {"loss": {"kind": "jsd"}, "objective": {"kd_coef": 0.5, "rl_coef": 1.0}}
    scheduled = {
        "loss": {"kind": "forward_kl", "regions": []},
        "objective": {"kd_coef": 1.0, "rl_coef": {"kind": "linear", "to": 1.0}},
    }
    regions = {"loss": {"kind": "forward_kl", "regions": [{"where": "handed", "kind": "jsd"}]}}
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", skd=two_terms),
        write_run(tmp_path / "c", skd=scheduled),
        write_run(tmp_path / "d", skd=regions),
    ]
    assert [tables.loss(run) for run in read_runs(runs)] == [
        "forward_kl",
        "0.5 jsd + 1.0 policy loss",
        "1.0 forward_kl + scheduled policy loss",
        "forward_kl (others in regions)",
    ]


def test_what_the_teacher_alone_reads(tmp_path):
    own = {"teacher": {"prompt": {"system": "Be brief.", "template": "{input} <b>", "column": None, "max_len": 90}}}
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", skd=own)]
    assert [tables.teachers_prompt(run) for run in read_runs(runs)] == ["", "system: Be brief.; template: {input} <b>"]
    assert "The teacher alone reads" not in report(tmp_path, runs[0]).text
    assert "The teacher alone reads" in report(tmp_path, runs[1]).text


def test_settings_that_differ_without_the_run_folder_and_without_secrets(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", skd={"loss": {"kind": "jsd", "beta": 0.3}})]
    differing = tables.differing_settings(read_runs(runs))
    assert differing == [("skd.loss.kind", ["forward_kl", "jsd"]), ("skd.loss.beta", ["-", "0.3"])]
    page = report(tmp_path, *runs)
    assert "wandb-secret" in (tmp_path / "a" / "config.yaml").read_text()
    assert "wandb-secret" not in (tmp_path / "out" / "report.html").read_text()
    assert "(not shown)" in page.text and "different losses" in page.text


@pytest.mark.parametrize("name", ["openrlhf.logger.wandb.key", "openrlhf.reward.api_key", "skd.vllm.hf_token"])
def test_secret_names(name):
    assert tables.SECRET.search(name)


@pytest.mark.parametrize(
    "name", ["openrlhf.data.input_key", "openrlhf.ckpt.best_metric_key", "skd.loss.teacher_top_k"]
)
def test_names_that_are_no_secrets(name):
    assert not tables.SECRET.search(name)


def test_last_and_best_values_and_who_leads(tmp_path):
    worse = [
        {"step": 1, "skd/loss": 0.05, "skd/accept_rate": 0.9},
        {"step": 2, "skd/loss": 0.4, "skd/accept_rate": 0.1},
    ]
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", metrics=worse)])
    rows = {metric.name: cells for metric, cells in tables.comparison(runs, metrics_of(runs))}
    a, b = rows["skd/loss"]
    assert (a.last, a.best, a.last_leads, a.best_leads) == ("0.1", "0.1 at step 3", True, False)
    assert (b.last, b.best, b.last_leads, b.best_leads) == ("0.4", "0.05 at step 1", False, True)
    assert rows["skd/kl"][1] is None and not rows["skd/kl"][0].last_leads
    assert rows["skd/accept_rate"][0].best == ""  # more is not better


def test_losses_of_different_kinds_are_not_ranked(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", skd={"loss": {"kind": "jsd"}})])
    lines(runs[1].folder.metrics.path, three_steps(loss=0.1))
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    rows = {metric.name: cells for metric, cells in tables.comparison(runs, metrics_of(runs))}
    assert not any(cell.last_leads or cell.best_leads for cell in rows["skd/loss"])
    assert rows["skd/kl"][1].last_leads


def test_every_metric_can_be_chosen_and_known_ones_come_first(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    curves = json.loads(page.data("curve-data"))
    names = [metric["name"] for metric in curves["metrics"]]
    assert set(names) == {name for record in three_steps() for name in record} - {
        "step",
        "grad_norm",
        "eval/sums/teacher_accuracy",
    }
    assert names[0] == "eval/sums/accuracy" and names[-1] == "my/own"
    first = ["eval/sums/accuracy", "skd/loss", "skd/accept_rate", "skd/kl", "skd/response_len", "skd/student_entropy"]
    assert curves["first"] == first
    accuracy = curves["metrics"][0]
    assert curves["runs"][0]["series"][accuracy["teacher"]] == [[0], [1.0]]
    assert curves["runs"][0]["series"]["skd/loss"] == [[1, 2, 3], [0.3, 0.15, 0.1]]
    assert curves["runs"][0]["seconds"] == [[0, 1, 2, 3], [0.0, 2.0, 4.0, 6.0]]


def test_unknown_metrics_alone_are_shown_too(tmp_path):
    runs = read_runs([write_run(tmp_path / "run", metrics=[{"step": 1, "x/y": 1.0}])])
    assert shown_first(metrics_of(runs)) == ["x/y"]


# ---- nothing in a run acts in the page


def test_hostile_text_stays_text(tmp_path):
    record = trace([TOM], prompt=HOSTILE, response=HOSTILE)
    student = write_tokenizer(tmp_path / "student", ["</s>", HOSTILE, *WORDS[2:]])
    metrics = [*three_steps(), {"step": 3, f"eval/{HOSTILE}/accuracy": 0.5, HOSTILE: 1.0}]
    skd = {"teacher": {"model_name_or_path": HOSTILE}, "loss": {"kind": HOSTILE}}
    traces = [record, trace([TOM, COINS], {1: TOM})]
    run = write_run(tmp_path / "<b>&run", metrics=metrics, traces=traces, student=student, skd=skd)
    clean, page = report(tmp_path, write_run(tmp_path / "clean")), report(tmp_path, run)
    assert "img" not in page.tags and "b" not in page.tags
    assert page.tags.count("script") == clean.tags.count("script") == 6
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    blob = Blob(page.data("trace-data"))
    assert HOSTILE in blob.header["strings"] and HOSTILE in blob.texts("token")
    assert HOSTILE in json.loads(page.data("curve-data"))["runs"][0]["series"]
    assert "{{ 7*7 }}" in page.text and "<b>&run" in page.text


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    assert {value for _, name, value in page.attributes if name in ("src", "href", "action", "data")} <= {
        "#runs",
        "#curves-title",
        "#comparison-title",
        "#comparison",
        "#traces-title",
    }
    html = (tmp_path / "out" / "report.html").read_text()
    assert set(re.findall(r"\w+://[^\s)\"']+", html)) == {"https://github.com/leeoniya/uPlot"}  # uPlot's own banner
    assert "@import" not in html and "url(" not in html


def test_the_policy_names_each_script_that_runs_and_nothing_else(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none';") and policy.endswith("style-src 'unsafe-inline'")
    running = [text for attributes, text in page.scripts if "type" not in attributes]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes and len(hashes) == 4


def test_the_library_comes_with_its_licence_and_is_small():
    assert "The MIT License" in (ASSETS / "uPlot.LICENSE").read_text()
    assert len((ASSETS / "uPlot.iife.min.js").read_bytes()) < 100_000


# ---- the rest


def test_png_files(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "png"
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", metrics=[{"step": 1, "skd/loss": 1.0}])]
    report(tmp_path, *runs, options=("--png", str(folder)))
    files = {path.name: path.read_bytes()[:8] for path in folder.iterdir()}
    assert {"skd_loss.png", "eval_sums_accuracy.png", "my_own.png"} <= set(files)
    assert "eval_sums_teacher_accuracy.png" not in files  # a line in the chart of the student's
    assert set(files.values()) == {b"\x89PNG\r\n\x1a\n"}


def test_a_png_of_a_metric_of_any_name(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "png"
    metrics = [{"step": 1} | dict.fromkeys(["$\\frac{$", "a/b", "a b", "x" * 300], 1.0)]
    report(tmp_path, write_run(tmp_path / "run", metrics=metrics), options=("--png", str(folder)))
    assert {path.name for path in folder.iterdir()} == {"_frac_.png", "a_b.png", "a_b_2.png", "x" * 100 + ".png"}


def test_png_without_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "x.html"
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--png", str(tmp_path / "png"), "--out", str(out)]) == 2
    assert "pip install 'skd_plugin[report]'" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_line_is_read_before_anything_heavy():
    code = "import json, sys, skd_plugin.cli, skd_plugin.report.command; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "transformers", "numpy", "jinja2", "matplotlib"} & set(json.loads(output))
