"""What a person is told when something of theirs is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """The user's recipe is wrong. The message says what was found, what was expected and what to do."""


def unknown_key(key: str, known: Iterable[str]) -> str:
    return f"unknown key '{key}'{did_you_mean(key, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one that goes on after it, the nearest known one, or nothing."""
    known = list(known)
    near = [other for other in known if other.startswith(name)]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
