"""The page of `skd report` in a real browser, opened from disk as a person opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skd_plugin.cli import main
from tests.browser.chromium import EXECUTABLE, Chromium, chromium
from tests.run_folder import COINS, FOUR, HAS, LOST, NEWLINE, SEVEN, THE, TOM, WORDS, trace, write_run, write_tokenizer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not EXECUTABLE, reason="no Chromium here (Debian's package is chromium)"),
]

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
STEPS = 45


def responses() -> list[dict]:
    """One with everything in it, then 45 of rising step and KL, the odd ones with a replacement."""
    prompts = {"prompt": "the first prompt\n:", "teacher_prompt": "a rule\nthe first prompt and more\n:"}
    special = [
        trace([TOM, HAS, FOUR, SEVEN], {2: COINS}, step=0, kl=[9.0] * 4, **prompts),
        trace([NEWLINE, THE], step=0, source="ua", kl=[8.0, 8.0], draft_rank=[-1, 1], prompt=HOSTILE, teacher="math"),
    ]
    rest = [
        trace([TOM] + [THE] * (step % 7), {0: LOST} if step % 2 else None, step=step, kl=[step / 100] * (1 + step % 7))
        for step in range(1, STEPS + 1)
    ]
    return special + rest


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two runs, so that all there is to see is there."""
    folder = tmp_path_factory.mktemp("report")
    student = write_tokenizer(folder / "student", [WORDS[0], *WORDS[1:8], HOSTILE])
    runs = [
        write_run(folder / "first", traces=responses(), student=student),
        write_run(folder / "second", traces=[trace([TOM], prompt="of the second run")], student=student),
    ]
    assert main(["report", *map(str, runs), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture
def opened(browser, page) -> Chromium:
    browser.open(page)
    return browser


def texts(browser: Chromium, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")


def change(browser: Chromium, id_: str, value: str, event: str = "change") -> None:
    element = f"document.getElementById({id_!r})"
    browser.run(f"{element}.value = {value!r}; {element}.dispatchEvent(new Event({event!r}))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1400])
def test_opens_without_a_word_and_without_a_request(browser, page, scheme, width):
    browser.open(page, width=width, scheme=scheme)
    assert browser.problems == []
    assert browser.run("document.documentElement.dataset.theme") == scheme
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert len(texts(browser, ".trace")) == 20
    assert browser.run("document.querySelectorAll('#charts canvas').length") == 6


def test_text_of_a_run_does_not_run(opened):
    assert HOSTILE in texts(opened, ".prompt")
    for place in (".corrections del", ".tokens del"):
        assert HOSTILE.replace(" ", "␣") in texts(opened, place)
    assert opened.run("window.hacked") is None and opened.problems == []


def test_what_the_teacher_reads_and_the_student_does_not(opened):
    """The student's prompt may stand in the middle of the teacher's, with the end of a chat's turn behind both."""
    (both,) = [text for text in texts(opened, ".prompt") if text.startswith("The teacher reads")]
    assert both == "The teacher reads: a rule\nthe first prompt and more\n:"
    assert texts(opened, ".prompt .own") == ["a rule\n", " and more"]


def test_of_several_teachers_a_response_names_its_own(opened):
    assert [text for text in texts(opened, ".facts span") if text.startswith("teacher")] == ["teacher math"]


def test_tokens_have_their_exact_text_and_the_class_of_their_origin(opened):
    first = "document.querySelector('.trace .tokens')"
    spans = opened.run(f"[...{first}.querySelectorAll('.token')].map((e) => [e.textContent, e.className])")
    assert spans == [
        [" tom", "token source-s"],
        [" has", "token source-s"],
        [" 4", "token source-t"],
        ["7", "token source-s"],
    ]
    assert texts(opened, ".tokens del")[0] == "␣coins"
    assert opened.run(f"{first}.querySelector('del').nextSibling.textContent") == " 4"
    second = "document.querySelectorAll('.tokens')[1].querySelectorAll('.token')"
    assert opened.run(f"[...{second}].map((e) => e.className)") == ["token source-u", "token source-a"]


def test_the_mouse_over_a_token_shows_what_both_models_thought(opened):
    opened.hover(".tokens .source-t")
    opened.wait("!document.getElementById('inspector').hidden")
    shown = opened.run("document.getElementById('inspector').innerText").replace("\u00a0", " ")
    proposal = "␣coins rejected, the teacher's no. 5"
    for part in ("replaced", "75.0 %", "50.0 %", proposal, "9 nats", "0.5 nats", "token 3 of 4, id 3"):
        assert part in shown, part
    rows = [row.replace("\u00a0", " ") for row in texts(opened, "#inspector tr")]
    assert rows[:2] == ["␣475.0 %", "␣the12.5 %"] and rows[2].endswith("6.2 %") and rows[3] == "all others6.3 %"


def test_keys_walk_over_the_tokens(opened):
    opened.run("document.querySelector('.tokens').focus()")
    for key, expected in [("ArrowRight", 0), ("ArrowRight", 1), ("End", 3), ("ArrowRight", 3), ("ArrowLeft", 2)]:
        opened.press(key)
        place = "[...document.querySelector('.tokens').querySelectorAll('.token')]"
        assert opened.run(f"{place}.findIndex((e) => e.classList.contains('current'))") == expected
    assert not opened.run("document.getElementById('inspector').hidden")
    active = opened.run("document.querySelector('.tokens').getAttribute('aria-activedescendant')")
    assert active == opened.run("document.querySelector('.current').id")
    opened.press("Escape")
    assert opened.run("document.getElementById('inspector').hidden")


def test_search_and_its_marks(opened):
    change(opened, "search", "FIRST prompt", "input")
    opened.wait("document.querySelectorAll('.trace').length === 1")
    assert texts(opened, "mark") == ["first prompt", "first prompt"]
    change(opened, "search", "a rule", "input")
    opened.wait("document.querySelectorAll('mark').length === 1")
    change(opened, "search", "has 4", "input")
    opened.wait("document.querySelectorAll('.found').length === 2")
    assert texts(opened, ".found") == [" has", " 4"]
    change(opened, "search", "no such text", "input")
    opened.wait("document.querySelectorAll('.trace').length === 0")
    assert texts(opened, "#trace-list .empty") == ["No response matches."]


def facts(browser: Chromium, part: str) -> list[str]:
    return [text for text in texts(browser, ".trace .facts span") if part in text]


def test_orders(opened):
    change(opened, "sort", "step")
    assert facts(opened, "step")[:3] == [f"step {STEPS - i}" for i in range(3)]
    opened.run("document.getElementById('direction').click()")
    assert facts(opened, "step")[:4] == ["step 0", "step 0", "step 1", "step 1"]  # one of them of the second run
    change(opened, "sort", "length")
    assert facts(opened, "tokens")[0] == "1 tokens"
    opened.run("document.getElementById('direction').click()")
    assert facts(opened, "tokens")[0] == "7 tokens"
    change(opened, "sort", "replaced")
    assert facts(opened, "replaced")[0] == "100\u00a0% replaced"
    change(opened, "sort", "meanKl")
    assert facts(opened, "KL")[:3] == ["mean KL 9", "mean KL 8", "mean KL 0.45"]


def test_steps_runs_and_pages(opened):
    change(opened, "step-from", "3")
    change(opened, "step-to", "5")
    assert sorted(facts(opened, "step")) == ["step 3", "step 4", "step 5"]
    change(opened, "step-from", "")
    change(opened, "step-to", "")
    change(opened, "trace-run", "1")
    assert texts(opened, ".prompt") == ["of the second run"]
    change(opened, "trace-run", "-1")
    seen = []
    for number in (20, 20, STEPS + 3 - 40):
        assert len(texts(opened, ".trace")) == number
        seen += texts(opened, ".trace")
        opened.run("document.querySelector('.pager .next').click()")
    assert len(set(seen)) == len(seen)
    assert opened.run("document.querySelector('.pager .next').disabled")


def test_colours_by_number(opened):
    change(opened, "colour", "kl")
    levels = opened.run("[...document.querySelectorAll('.tokens')].map((e) => e.querySelector('.token').className)")
    assert levels[:3] == ["token level-5", "token level-5", "token level-3"]


def test_metrics_are_chosen_runs_are_hidden_and_curves_smoothed(opened):
    charts = "document.querySelectorAll('.chart').length"
    opened.run("[...document.querySelectorAll('#chooser button')].find((e) => e.title === 'my/own').click()")
    assert opened.run(charts) == 7 and "my/own" in texts(opened, ".chart strong")
    opened.run("document.querySelector('#run-legend button').click()")
    assert opened.run("document.querySelectorAll('.chart .swatch.run0').length") == 0
    assert opened.run("document.querySelectorAll('.chart .swatch.run1').length") == 7
    change(opened, "smoothing", "0.5", "input")
    assert texts(opened, ".chart .readout")[1] == "last, smoothed0.1429"  # (0.3 / 4 + 0.15 / 2 + 0.1) / (7 / 4)
    change(opened, "x-axis", "seconds")
    assert opened.problems == []


def test_the_button_changes_the_theme(opened):
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened.run(background)
    opened.run("document.getElementById('theme').click()")
    assert opened.run(background) != light and opened.run("document.getElementById('theme').textContent") == "Light"


def test_without_decompression_the_rest_is_there_and_the_page_says_so(browser, page):
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        browser.open(page)
        assert "This browser cannot unpack the responses" in texts(browser, "#trace-list")[0]
        assert browser.run("document.querySelectorAll('#charts canvas').length") == 6
        assert browser.problems == []
    finally:
        browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_a_run_without_metrics_and_one_without_responses(browser, tmp_path):
    for name, kept in (("a", "traces.jsonl"), ("b", "metrics.jsonl")):
        run = write_run(tmp_path / name)
        for file in {"traces.jsonl", "metrics.jsonl"} - {kept}:
            (run / file).unlink()
        assert main(["report", str(run), "--out", str(tmp_path / f"{name}.html")]) == 0
        browser.open(tmp_path / f"{name}.html")
        assert browser.problems == []
        assert (len(texts(browser, ".trace")) > 0, len(texts(browser, ".chart")) > 0) == (name == "a", name == "b")


# ---- a folder with everything damaged that can be


def damaged_run(folder: Path) -> Path:
    """Whole are steps 1 to 3 and the first two responses; every other line of every file is not."""
    run = write_run(folder, student=write_tokenizer(folder.with_name("words"), [*WORDS[:8], "</script><!--<script>"]))
    whole = trace([TOM, HAS])
    spoilt: list[dict] = [
        {"prompt": 5},
        {"prompt": "</script><!--<script>\ud83d\u2028", "response": "\ud83d\ude00"},
        {"kl": [float("inf"), 10**400]},
        {"kl": [1e30, -1e30], "step": 2**32 - 1, "draft_rank": [2**31 - 1, 0]},
        {"student_logp": [float("nan"), -(10.0**300)], "teacher_topk_logp": [[None] * 3] * 2},
        {"response_ids": [2**31 - 1, 0], "rejected_ids": [2**31 - 1, -1]},
        {"teacher_topk_ids": [[]] * 2, "teacher_topk_logp": [[]] * 2},
        *({"response_ids": ids} for ids in (None, ["1", "2"], [-5, 1], [10**30, 1], [1.5, 2], [1])),
        *({"teacher_topk_ids": rows} for rows in (None, [None] * 2, [[None] * 3] * 2, [[1]] * 2)),
        *({"step": step} for step in (None, -1, "1", 10**30)),
        {"source": "xy"},
        {"kl": ["a", None]},
    ]
    lines = [json.dumps(whole | fields) for fields in [*spoilt, {name: [] for name in whole if name[-3:] == "ids"}]]
    del whole["draft_rank"]
    empty = trace([], step=2)
    odd = [json.dumps(whole), json.dumps(empty), "null", "{}", "[" * 5000, "9" * 5000, '{"step": 3, "resp']
    with (run / "traces.jsonl").open("a") as file:
        file.write("\n".join([*lines, *odd]))
    names = [
        "__proto__",
        "constructor",
        "toString",
        "",
        "</script><!--<script>",
        "\ud800",
        "eval//",
        "eval/</script>/x",
    ]
    values = ["1", [1], {}, True, None, float("nan"), float("inf"), -float("inf"), 10**400, 10**30, -1e30, 1e-300]
    records = [
        *({"step": 3, name: 1.0} for name in names),
        *({"step": step, "skd/response_len": value} for step, value in enumerate(values, start=4)),
        *({"step": step, "skd/student_entropy": 1.0} for step in (None, "4", 4.5, True, -1, 10**30)),
        *({"step": step, "time/step": -1e30, "tokens_per_s": 1e30} for step in (2**32 - 1, 20, 19)),
        *({"step": step, "huge": value} for step, value in ((1, 1e30), (2, -1e30), (3, 1e16), (4, 1e16 + 2))),
        *({"step": 2**32 - 2 + step, "late": value} for step, value in ((0, 1e16), (1, 1e16 + 2))),
    ]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n" + "\n".join(json.dumps(record) for record in records).encode() + b'\n{"step": 3')
    (run / "status.json").write_bytes(b'{"stage": "\\ud83d", "planned_steps": 1e400}')
    return run


@pytest.mark.parametrize("config", [None, "[a, list]", "skd: {1: 2}"])
def test_of_a_damaged_folder_the_whole_parts_are_shown_and_no_script_stops(browser, tmp_path, config):
    runs = [damaged_run(tmp_path / "damaged"), write_run(tmp_path / "whole", traces=[trace([TOM])])]
    if config is not None:
        (runs[0] / "config.yaml").write_text(config)
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "report.html")]) == 0
    browser.open(tmp_path / "report.html")
    assert browser.problems == []
    notes = " ".join(texts(browser, ".run .note"))
    for part in (
        "metrics.jsonl: 1 line left out: half written",
        "metrics.jsonl: 6 records left out: step is no whole number from 0 to 4,294,967,295",
        "metrics.jsonl: 8 values left out: 'skd/response_len' is not a number that can be drawn",
        "traces.jsonl: 1 prompt left out: it is no text; its tokens are here (line 3).",
        "traces.jsonl: 4 responses left out: step is no whole number from 0 to 4,294,967,295",
        "status.json: planned_steps is no number of steps",
    ):
        assert part in notes, part
    assert ("config.yaml cannot be read" in notes) == (config is not None)
    change(browser, "trace-run", "0")
    shown = [text for text in texts(browser, ".trace .facts span") if text.endswith(" tokens")]
    assert shown.count("6 tokens") == shown.count("3 tokens") == shown.count("0 tokens") == 1
    assert shown.count("2 tokens") == 7
    browser.run("document.querySelectorAll('#chooser button[aria-pressed=false]').forEach((e) => e.click())")
    charts = texts(browser, ".chart strong")
    assert {"Loss", "__proto__", "constructor", "huge", "late", "</script><!--<script>"} <= set(charts)
    assert len(charts) == browser.run("document.querySelectorAll('#charts canvas').length")
    for axis in ("seconds", "step"):
        change(browser, "x-axis", axis)
        change(browser, "smoothing", "0.5", "input")
    for order in ("maxKl", "replaced", "length", "step", "meanKl"):
        change(browser, "sort", order)
    browser.hover(".tokens .token")
    browser.wait("!document.getElementById('inspector').hidden")
    assert browser.problems == [] and browser.run("window.hacked") is None
