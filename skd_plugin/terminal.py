"""The console of the commands. What they print is not theirs alone (errors of other libraries, paths, names of
students and metrics), so that no string is ever read as markup, as an emoji or by the terminal: what has a style is a
`rich.text.Text`, and characters that a terminal obeys instead of showing them are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

COLOURS = re.compile(r"\x1b\[[\d;]*m")
# ESC, BEL, CR and the like, those of C1 too; a terminal would clear its screen, set its title, go back in the line.
CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
# Marks, embeddings, overrides and isolates, which show what follows in another order.
BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
# Half a character is none in UTF-8: to print it is an error.
SHOWN_AS = {
    **dict.fromkeys(code for code in (*CONTROLS, *BIDI) if chr(code) not in "\n\t"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


def plain(text: str) -> str:
    """The text without what a terminal would obey, and without colours, as Ray's errors have them."""
    return COLOURS.sub("", text).translate(SHOWN_AS)


def say(text: str) -> None:
    """A line on standard error: an error, a notice, where a result is."""
    print(plain(text), file=sys.stderr)


class PlainConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """All that is printed comes through here, tables and spinners too; codes of the console's own are marked."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def plain_console(**options: Any) -> Console:
    """A console that shows a string as it is.

    Args:
        options: further ones of rich's Console.
    """
    return PlainConsole(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def waiting(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """A spinner beside a text, and the function that changes the text. rich's own would read it as markup."""
    with console.status(Text(text)) as spinner:
        yield lambda news: spinner.update(Text(news))
