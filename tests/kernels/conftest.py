"""Triton's kernels, on a GPU where there is one, else in Triton's interpreter: numpy does what each line says.

Triton is a gigabyte that nothing on a CPU needs, so that scripts/test.sh puts it where only these tests look.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made
    # Of 0 times infinity, which the kernels leave out where they add up; of the lowest number by a low temperature.
    np.seterr(invalid="ignore", over="ignore")
sys.path.append(str(Path(__file__).parents[2] / ".venv" / "triton"))

pytest.importorskip("triton", reason="bash scripts/test.sh tests/kernels installs Triton for them")
