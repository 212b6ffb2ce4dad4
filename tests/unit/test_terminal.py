"""What is printed is not ours alone: an error, a path, a name of a model or metric is shown as it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig
from skd_plugin.run import supervisor
from skd_plugin.terminal import plain_console, waiting

HOSTILE = [
    "unexpected token [/INST] in the template",
    "expected [a, b], got [bold]c[/bold]",
    ":warning: :smile:",
    "a\\[b] \\",
    "[link=x]",
    "[",
    "[/]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_shows_strings_as_they_are(text: str) -> None:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    console = plain_console(file=io.StringIO(), width=200)
    console.print(text, Text(text))
    console.print(table)
    assert console.file.getvalue().count(text) == 6


@pytest.mark.parametrize("text", HOSTILE)
def test_a_spinner_shows_strings_as_they_are(text: str) -> None:
    console = plain_console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with waiting(console, "start") as tell:
        tell(f"now: {text}")
    assert f"now: {text}" in console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_the_error_of_a_run_arrives(text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "[/runs] [a, b]"
    run = Run(SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=str(folder)), {}, cpu=True)

    def fail(command, log, look, name) -> int:
        run.folder.status.stage(text)
        look()
        run.folder.status.stage("failed", error=text)
        return 1

    monkeypatch.setattr(supervisor, "run_module", fail)
    assert supervisor.supervise(run) == 1
    said = capsys.readouterr().out
    assert f"The run failed: {text}" in said and f"The whole story is in {folder}/host.log" in said
    run.folder.metrics.append({"step": 1})
    assert supervisor.supervise(run) == 1
    assert f"so it is now in {folder}.1" in capsys.readouterr().out
