"""What was there when an actor had started is not looked at again."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc, weakref
class Node: pass
there = [Node() for _ in range(100_000)]
from skd_plugin.host.garbage import keep_what_is_there, look_less_often
lost = Node(); lost.itself = lost; del lost
keep_what_is_there()
assert gc.get_threshold()[0] < 10_000, "a trainer would keep memory of a GPU"
look_less_often()
assert gc.get_threshold()[0] == 10_000
assert gc.get_freeze_count() > 100_000, gc.get_freeze_count()
assert not any(isinstance(one, Node) for one in gc.get_objects()), "it is still looked at"
later = Node(); later.itself = later; known = weakref.ref(later); del later
gc.collect()
assert known() is None, "what comes later is not collected"
"""


def test_what_is_there_is_kept_and_what_comes_later_is_collected() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
