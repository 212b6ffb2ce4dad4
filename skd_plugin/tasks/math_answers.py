"""Final answers of mathematical texts: where they are, and whether two of them are equal.

Equality is math-verify's. It needs the main thread of a process for its time limit, and a response may hold a power
that no one can compute; so it runs in a process of its own, which is ended when it takes too long.
"""

from __future__ import annotations

import atexit
import json
import re
import select
import subprocess
import sys
from fractions import Fraction
from threading import Lock

LIMIT_S = 10.0  # of one comparison; the answer counts as wrong then
START_S = 60.0  # of the process, which imports sympy
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
    return _VERIFIER.equal(answer, gold)


def _number(text: str) -> Fraction | None:
    """The value of a plain number, with separators, a currency or a full stop around it."""
    bare = text.replace(",", "").replace("\\$", "").replace("$", "").replace("\\!", "").strip().rstrip(".")
    return Fraction(bare) if _NUMBER.fullmatch(bare) else None


class _Verifier:
    """One process that compares, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = Lock()  # OpenRLHF asks from several threads
        self._process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, gold: str) -> bool:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(json.dumps([answer, gold]) + "\n")
            process.stdin.flush()
            reply = self._read(process, LIMIT_S)
            if reply is None:
                self.close()
                return False
            return reply == "true"

    def close(self) -> None:
        """Ends the process, if there is one; the next comparison starts another."""
        if self._process is not None:
            with self._process as process:  # closes the pipes and waits
                process.kill()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            if self._read(self._process, START_S) != "ready":
                raise RuntimeError("math-verify does not start; try python -c 'import math_verify'")
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[str], limit_s: float) -> str | None:
        """A line of the process; None if it does not come in time, "" if the process has ended."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], limit_s)
        return process.stdout.readline().strip() if ready else None


_VERIFIER = _Verifier()
atexit.register(_VERIFIER.close)


def _serve() -> None:
    """The other process: a pair of answers a line in, true or false out, until the input ends."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = (parse(f"${text}$", parsing_timeout=3) for text in json.loads(line))
        print(json.dumps(bool(verify(gold, answer, timeout_seconds=3))), flush=True)


if __name__ == "__main__":
    _serve()
