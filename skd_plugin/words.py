"""Numbers, names and errors as people read them."""

from __future__ import annotations


def count(number: int, thing: str) -> str:
    """'1 token', '2,000 tokens'."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """'8s', '3m08s', '1h02m'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def short_name(model: str) -> str:
    """The last two parts of a path; a Hugging Face name has two anyway."""
    return "/".join(model.rstrip("/").split("/")[-2:])


def first_line(error: BaseException) -> str:
    """Of the error's message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def root_cause(error: BaseException, longest: int = 300) -> str:
    """What the error was raised from, in one line: libraries put general words around what says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= longest else f"{words[:longest]}..."
