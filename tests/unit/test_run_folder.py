"""The files of a run folder, half written ones too, and the replacing of names in libraries."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from skd_plugin import cli
from skd_plugin.errors import RecipeError
from skd_plugin.run_folder import JsonLines, LeftOut, RunFolder, Status, damaged, out_file
from skd_plugin.seams import rebind
from tests.recipes import QUICKSTART

NAN = float("nan")


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).append({"step": 1, "a": 0.5, "b": NAN, "c": None, "d": "text"})
    JsonLines(path).append({"step": 2, "traces": [1, 2]})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "a": 0.5, "b": None, "c": None, "d": "text"},
        {"step": 2, "traces": [1, 2]},
    ]
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinity_is_null_too(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).append({"kl": value})
    assert path.read_text() == '{"kl":null}\n'


def test_status_keeps_its_facts(tmp_path: Path) -> None:
    status = Status(tmp_path)
    assert status.read() == {}
    status.stage("training", planned_steps=10)
    status.stage("failed", error="boom")
    assert Status(tmp_path).read() == {"stage": "failed", "planned_steps": 10, "error": "boom"}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_the_error_of_an_earlier_attempt_is_forgotten(tmp_path):
    status = Status(tmp_path)
    status.stage("stopped", error="stopped by the user")
    status.stage("training", planned_steps=3)
    assert status.read() == {"stage": "training", "planned_steps": 3}


def test_lines_are_cut_after_a_step(tmp_path: Path) -> None:
    """With what is half written."""
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.cut_after(2)  # there is no file
    lines.path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{"step": 2, "a')
    assert lines.cut_after(2) == ["lines.jsonl: 1 line left out: half written (line 4); kept in lines.jsonl.damaged."]
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert damaged(lines.path).read_text() == '{"step": 2, "a\n'


DAMAGE = {
    "zero bytes of a power cut": b"\0" * 4096,
    "no object": b"[1]\n7\nnull\n",
    "bad UTF-8": b'{"step": 1, "a": "\xff"}\n',
    "half a line before another": b'{"step": 1, "a{"step": 1}\n',
    "nested too deep": b"[" * 100_000 + b"\n",
    "a number too long": b"9" * 5000 + b"\n",
    "no step": b'{"a": 1}\n{"step": "1"}\n{"step": true}\n{"step": 1.5}\n',
    "a whole record without its end": b'{"step": 2}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_record_of_a_step_is_put_aside_and_told(tmp_path: Path, damage: bytes) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.path.write_bytes(b'{"step": 1}\n' + damage)
    assert {"step": 1} in lines.read()
    (note, *_) = lines.cut_after(2)
    assert note.startswith("lines.jsonl: ") and note.endswith("; kept in lines.jsonl.damaged.")
    assert lines.path.read_bytes() == b'{"step": 1}\n'
    assert damaged(lines.path).read_bytes().removesuffix(b"\n") == damage.removesuffix(b"\n")
    lines.append({"step": 2})
    assert lines.cut_after(2) == [] and lines.read() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("content", [b"", b"\0" * 60, b'{"stage": "tr', b"[]", b'{"stage": "\xff"}'])
def test_a_status_that_is_none_is_empty_and_put_aside(tmp_path: Path, content: bytes) -> None:
    status = Status(tmp_path)
    assert status.put_aside() == []
    status.path.write_bytes(content)
    assert status.read() == {}
    assert status.put_aside() == ["status.json is no record of JSON; kept in status.json.damaged."]
    assert damaged(status.path).read_bytes() == content and not status.path.exists()
    status.stage("training")
    assert status.put_aside() == [] and status.read() == {"stage": "training"}


def test_scan_leaves_out_what_is_no_record(tmp_path: Path) -> None:
    lines, left_out = JsonLines(tmp_path / "traces.jsonl"), LeftOut("traces.jsonl")
    assert list(lines.scan(left_out)) == [] and lines.count() == 0 and not left_out.notes()  # there is no file
    deep = b"[" * 100_000
    lines.path.write_bytes(b'{"a": 1}\n[2]\n\n\xff\n{"a": 3}\n' + deep + b"\n" + b"9" * 5000 + b'\n{"a": 4')
    assert list(lines.scan(left_out)) == [(1, {"a": 1}), (5, {"a": 3})] and lines.count() == 8
    assert left_out.notes() == [
        "traces.jsonl: 4 lines left out: no record of JSON (line 2, 4, 6, 7).",
        "traces.jsonl: 1 line left out: half written (line 8).",
    ]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    lines, left_out = JsonLines(tmp_path / "metrics.jsonl"), LeftOut("metrics.jsonl")
    lines.path.touch()
    monkeypatch.setattr(Path, "open", refused)
    assert list(lines.scan(left_out)) == []
    assert left_out.notes() == ["metrics.jsonl cannot be read: Permission denied."]


def test_of_many_reasons_and_lines_the_first_are_told() -> None:
    left_out = LeftOut("metrics.jsonl")
    for line in range(1, 9):
        left_out.add("value", "no number", line)
    for reason in range(14):
        left_out.add("record", f"reason {reason}", 9)
    notes = left_out.notes()
    assert notes[0] == "metrics.jsonl: 8 values left out: no number (line 1, 2, 3, 4, 5, ...)."
    assert notes[1] == "metrics.jsonl: 1 record left out: reason 0 (line 9)."
    assert notes[12:] == ["metrics.jsonl: 3 more left out, for 3 other reasons."]


def test_config_makes_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.write_config({"skd": {"b": 1, "a": None}, "cpu": True})
    assert folder.read_config() == {"skd": {"b": 1, "a": None}, "cpu": True}
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


def test_rebinding_takes_a_name_that_is_there() -> None:
    module = types.ModuleType("library.part")
    module.name = 1
    rebind(module, "name", 2)
    assert module.name == 2
    with pytest.raises(RuntimeError, match=r"library\.part has no 'other' any more, so the sampler cannot take its"):
        rebind(module, "other", 2, needed_by="the sampler")
    with pytest.raises(RuntimeError, match=r"test_run_folder\..*Library has no 'method' any more.* of tests is"):
        rebind(type("Library", (), {}), "method", None)


def test_the_file_of_out_is_known_to_be_writable(tmp_path: Path) -> None:
    """Before the work that it is to hold."""
    assert out_file(str(tmp_path / "deep" / "out.json")).parent.is_dir()
    assert not (tmp_path / "deep" / "out.json").exists()
    (tmp_path / "file").write_text("kept")
    assert out_file(str(tmp_path / "file")).read_text() == "kept"
    for name, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "out.json", "cannot be written"),
        (tmp_path / ("x" * 5000), "cannot be written: File name too long"),
    ):
        with pytest.raises(RecipeError, match=f"--out .*{message}"):
            out_file(str(name))


@pytest.mark.parametrize("command", [["rollout", "--prompts", "p.jsonl"], ["eval"]])
def test_a_command_asks_for_its_file_first(command: list[str], tmp_path: Path, capsys) -> None:
    name, *options = command
    assert cli.main([name, str(QUICKSTART), *options, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is a folder" in capsys.readouterr().err
