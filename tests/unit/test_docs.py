"""The pages say what is so: links lead somewhere, tables, messages and examples are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")) if path.is_file()
)
EXAMPLES = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, no punctuation, a hyphen for each space."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue  # of the web
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: there is no {file}"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has the headings {sorted(anchors(file))}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name}" in index, page.name


def test_options_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_options_page", ROOT / "scripts" / "make_options_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run python scripts/make_options_page.py"


def messages_of_the_code() -> str:
    """Every text of the code, one a line, with … for what is filled in."""
    texts = []
    for path in (ROOT / "skd_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_errors_of_the_faq_are_those_of_the_code() -> None:
    """Under "Ours" a heading is a message; … stands for what the message fills in."""
    page = (ROOT / "docs" / "faq.md").read_text()
    ours = page.partition("\n## Messages of the plugin\n")[2].partition("\n## ")[0]
    quoted = re.findall(r"^### `(.+)`$", ours, re.MULTILINE)
    assert len(quoted) > 15
    known = messages_of_the_code()
    missing = [message for message in quoted if message not in known]
    assert not missing, missing


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda diff: re.search(r"\+\+\+ b/(\S+)", diff)[1])
def test_examples_of_extensions_fit_the_code(example: str) -> None:
    """What a diff leaves or takes away is in the file, line by line as it stands there."""
    file = (ROOT / re.search(r"\+\+\+ b/(\S+)", example)[1]).read_text()
    hunks = re.split(r"^@@.*@@.*\n", example, flags=re.MULTILINE)[1:]
    assert hunks
    for hunk in hunks:
        before = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
        assert "\n".join(before) in file, "\n".join(before)
