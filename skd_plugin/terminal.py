"""The console of the commands. What they print is not theirs alone (errors of other libraries, paths, names of
students and metrics), so that no string is ever read as markup or as an emoji: what has a style is a `rich.text.Text`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text


def plain_console(**options: Any) -> Console:
    """A console that shows a string as it is.

    Args:
        options: further ones of rich's Console.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def waiting(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """A spinner beside a text, and the function that changes the text. rich's own would read it as markup."""
    with console.status(Text(text)) as spinner:
        yield lambda news: spinner.update(Text(news))
