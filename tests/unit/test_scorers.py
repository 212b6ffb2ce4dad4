"""Scores against values computed by hand, and mathematical answers against what a person would say."""

from __future__ import annotations

import threading

import pytest

from skd_plugin.tasks import math_answers, scorers


def test_chrf_by_hand() -> None:
    """abc and abd: 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple; precision and recall are their mean."""
    assert scorers.chrf("abc", ["abd"]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scorers.chrf("abc", ["xyz", "abc"]) == 1.0 and scorers.chrf("", ["abc"]) == 0.0


def test_corpus_chrf_sums_before_it_divides() -> None:
    """Letters alone (responses of one letter): 1 of 1 and 0 of 1, together 1 of 2."""
    assert scorers.corpus_chrf(["a", "b"], ["a", "c"]) == pytest.approx(0.5)


def test_bleu_by_hand() -> None:
    """4/5 words, 3/4 pairs, 2/3 triples, 1/2 quadruples, no brevity penalty."""
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert scorers.corpus_bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(expected)


def test_rouge_by_hand() -> None:
    """Longest common subsequence "the cat sat" of 3 and 4 words; pairs: 2 of 2 and of 3."""
    found = scorers.rouge("the cat sat", ["nothing", "The cat sat down."])
    assert found["rouge_l"] == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert found["rouge_1"] == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert found["rouge_2"] == pytest.approx(2 * 1 * (2 / 3) / (5 / 3))
    assert scorers.rouge("sat cat", ["cat sat"])["rouge_l"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"first \boxed{3}, then \boxed{\frac{1}{", "3"),
        (r"\boxed {7}", "7"),
        (r"\boxed{", None),
        ("42", None),
    ],
)
def test_boxed(text: str, found: str | None) -> None:
    assert math_answers.boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("... #### 72", "72"), ("####1,000\nQ: next #### 3", "1,000"), ("####\n", None), ("72", None), ("", None)],
)
def test_after_hashes(text: str, found: str | None) -> None:
    assert math_answers.after_hashes(text) == found


@pytest.mark.parametrize(
    ("text", "found"), [("3 apples and 1,250.5 in all.", "1,250.5"), ("-4", "-4"), ("none", None), ("it is 7.", "7")]
)
def test_last_number(text: str, found: str | None) -> None:
    assert math_answers.last_number(text) == found


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("72", "72", True), ("72.0", "72", True), ("1,000", "1000", True), ("$5.50", "5.5", True), ("72.", "72", True),
        ("-3", "3", False), ("7", "72", False), ("", "72", False), (None, "72", False), ("1" * 501, "1", False),
        ("1/2", r"\frac{1}{2}", True), ("0.5", r"\frac12", True), ("2x + 1", "1 + 2x", True), ("x", "y", False),
        (r"\{1, 2\}", r"\{2, 1\}", True), ("(1, 2)", "(2, 1)", False), (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\text{yes}", r"\frac12", False), ("}{", "1", False), ("\n", "1", False),
    ],
)  # fmt: skip
def test_equal(answer: str | None, gold: str, same: bool) -> None:
    assert math_answers.equal(answer, gold) is same


def test_answers_are_compared_from_any_thread() -> None:
    """The host asks from the threads of a pool, where math-verify itself refuses to work."""
    found: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda n=n: found.append(math_answers.equal(rf"\frac{{{n}}}{{4}}", rf"\frac{{{2 * n}}}{{8}}"))
        )
        for n in range(1, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 5


def test_an_answer_that_hangs_is_wrong_and_the_next_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = math_answers.ask
    monkeypatch.setattr(math_answers, "ask", lambda *question: asked(*question, limit_s=0.0))  # nothing is as fast
    assert not math_answers.equal("a + b", "b + a")
    monkeypatch.setattr(math_answers, "ask", asked)
    assert math_answers.equal("a + b", "b + a")
