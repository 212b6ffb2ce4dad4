"""Numbers, names and errors in words."""

from __future__ import annotations

import pytest

from skd_plugin.words import count, duration, first_line, short_name


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (61, "1m01s"), (7325, "2h02m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 tokens"), (1, "1 token"), (2000, "2,000 tokens")])
def test_count(number: int, text: str) -> None:
    assert count(number, "token") == text


@pytest.mark.parametrize(
    ("model", "text"), [("/a/b/c/", "b/c"), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2")]
)
def test_short_name(model: str, text: str) -> None:
    assert short_name(model) == text


def test_first_line() -> None:
    assert first_line(ValueError("\nno such file\n  at all")) == "no such file"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
