"""What the process that becomes OpenRLHF prepares before it loads anything."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from skd_plugin.host.launch import own_programs_first


def test_ninja_is_this_environments(tmp_path):
    """DeepSpeed's operators are built by one and the same ninja, whether or not the environment is activated."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    path = own_programs_first(str(tmp_path))
    own = Path(sys.executable).parent
    assert shutil.which("ninja", path=path) == str(own / "ninja" if (own / "ninja").exists() else other)
    assert own_programs_first("") == str(own) and path.split(os.pathsep)[1:] == [str(tmp_path)]
