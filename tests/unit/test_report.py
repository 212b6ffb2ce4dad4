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

from skd_plugin.cli import main
from skd_plugin.core.methods import METHODS
from skd_plugin.report import tables
from skd_plugin.report.curves import metrics_of, shown_first
from skd_plugin.report.page import ASSETS
from skd_plugin.report.pieces import Pieces, load_pieces
from skd_plugin.report.run_record import read_runs
from skd_plugin.report.traces import corrections, pack_traces
from tests.run_folder import (
    COINS,
    FOUR,
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
    page = report(tmp_path, run)
    assert f"The last line of {name} is half written and was left out." in page.text
    assert "3 steps" in page.text and "2 sampled responses" in page.text


def test_unreadable_lines_in_the_middle_are_counted(tmp_path):
    run = write_run(tmp_path / "run")
    text = (run / "traces.jsonl").read_text()
    (run / "traces.jsonl").write_bytes(b"{oops}\n\n[1]\n\xff\n" + text.encode())
    page = report(tmp_path, run)
    assert "traces.jsonl: 3 unreadable line(s) were left out (line 1, 3, 4)." in page.text
    assert "2 sampled responses" in page.text


def test_traces_with_missing_or_uneven_fields_are_left_out(tmp_path):
    short, letter = trace([TOM, COINS], kl=[0.1]), trace([TOM], source="x")
    lacking = trace([TOM])
    del lacking["kl"]
    page = report(tmp_path, write_run(tmp_path / "run", traces=[short, lacking, letter, trace([THE])]))
    assert "3 trace(s) lack a field" in page.text and "1 sampled responses" in page.text


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
    scheduled = {"objective": {"kd_coef": 1.0, "rl_coef": {"kind": "linear", "to": 1.0}}}
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", skd=two_terms),
        write_run(tmp_path / "c", skd=scheduled),
    ]
    assert [tables.loss(run) for run in read_runs(runs)] == [
        "forward_kl",
        "0.5 jsd + 1.0 policy loss",
        "1.0 forward_kl + scheduled policy loss",
    ]


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
