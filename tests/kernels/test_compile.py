"""The kernels become machine code for the GPUs that people have, for which no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels import compile_run

CONSTANTS = 10  # of rank, of two kinds of look, of pieces, of two kinds of nucleus, of draw and of warp


def test_they_compile_for_gpus(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", compile_run.__name__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == CONSTANTS * len(compile_run.CARDS) * len(compile_run.LOGITS)
    assert min(sizes.values()) > 1000, sizes
