"""What is printed is not ours alone: an error, a path, a name of a model or metric is shown as it is."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from skd_plugin import cli
from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig
from skd_plugin.run import supervisor
from skd_plugin.terminal import plain_console, say, waiting

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


# Colours, clears the screen, sets the title, goes back in the line; C1's CSI, another order, half a character.
OBEYED = "\x1b[36ma\x1b[39m\x1b[2J\x1b]0;t\x07b\rc\x9b2Jd\u202ee\u2066f\ud800g\x7fh\x00i\x08"
SHOWN = "a[2J]0;tbc2Jdef\ufffdghi"


def test_a_terminal_obeys_no_text_that_is_not_ours(capsys: pytest.CaptureFixture) -> None:
    """Neither in a line nor in a table, a title or a spinner; the console's own codes stay."""
    table = Table("head", OBEYED, title=OBEYED)
    table.add_row(Text(OBEYED, style="red"), OBEYED)
    console = plain_console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(OBEYED, Text(OBEYED))
    console.print(table)
    with waiting(console, OBEYED) as tell:
        tell(OBEYED)
    written = console.file.getvalue()
    assert written.count(SHOWN) >= 6 and "\x1b[31m" in written
    written.encode()
    for code in ("\x1b[2J", "\x1b]0", "\x07", "b\rc", "\x9b", "\u202e", "\u2066", "\x7f", "\x00", "\x08"):
        assert code not in written, repr(code)
    rows = [line for line in written.splitlines() if line.startswith(("┃", "│"))]
    assert len(rows) == 2 and len({len(re.sub(r"\x1b\[[0-9;]*m", "", row)) for row in rows}) == 1, "columns are even"
    say(OBEYED)
    assert capsys.readouterr().err.startswith(SHOWN)


def test_an_error_of_a_recipe_is_plain(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its file's name and what is in it, where the errors of all commands are printed."""
    recipe = tmp_path / "a\x1b[2J.yaml"
    assert cli.main(["train", str(recipe)]) == 2
    recipe.write_text('"skd\\e[2J\\u202e": 1\n')
    assert cli.main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert said.count("a[2J.yaml") == 2 and "'skd[2J'" in said and "\x1b" not in said and "\u202e" not in said


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
