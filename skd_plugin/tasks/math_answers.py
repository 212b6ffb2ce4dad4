"""Final answers of mathematical texts: where they are, and whether two of them are equal.

Equality is math-verify's. It needs the main thread of a process for its time limit, and a response may hold a power
that no one can compute; so it is asked through judge.py.
"""

from __future__ import annotations

import re
from fractions import Fraction

from skd_plugin.tasks.judge import NoAnswer, ask

VERIFY = "skd_plugin.tasks.math_answers:verify"
LONGEST = 500  # characters of an answer
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_NUMBER_IN_TEXT = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} with all its braces closed; braces inside belong to it."""
    for start in [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)][::-1]:
        depth = 1
        for place in range(start, len(text)):
            escaped = text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def after_hashes(text: str) -> str | None:
    """What stands after the first "####", up to the end of its line: an answer in the form of GSM8K."""
    _, hashes, rest = text.partition("####")
    answer = rest.strip().split("\n")[0].strip()
    return answer if hashes and answer else None


def last_number(text: str) -> str | None:
    found = _NUMBER_IN_TEXT.findall(text)
    return found[-1] if found else None


def equal(answer: str | None, gold: str) -> bool:
    """Whether two answers are equal: as texts, as numbers, or by math-verify."""
    if answer is None or len(answer) > LONGEST:
        return False
    if answer.strip() == gold.strip():
        return True
    numbers = _number(answer), _number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    try:
        return ask(VERIFY, answer, gold)
    except NoAnswer:
        return False


def _number(text: str) -> Fraction | None:
    """The value of a plain number, with separators, a currency or a full stop around it."""
    bare = text.replace(",", "").replace("\\$", "").replace("$", "").replace("\\!", "").strip().rstrip(".")
    return Fraction(bare) if _NUMBER.fullmatch(bare) else None


def before_the_wall() -> None:
    import logging

    import math_verify  # noqa: F401 (with all of sympy)

    logging.disable(logging.WARNING)


def verify(answer: str, gold: str) -> bool:
    """math-verify's own word; asked for in a process of its own (judge.py)."""
    from math_verify import parse
    from math_verify import verify as verified

    parsed, wanted = (parse(f"${text}$", parsing_timeout=3) for text in (answer, gold))
    return bool(verified(wanted, parsed, timeout_seconds=3))
