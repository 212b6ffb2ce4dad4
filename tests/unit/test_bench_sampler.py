"""The sampler's benchmark runs, also where there is no vLLM, and adds its line to a table."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_sampler.py"
WITHOUT = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__'); import vllm; print(vllm.Any)"


def test_one_line_a_batch_size_without_vllm(tmp_path: Path) -> None:
    table = tmp_path / "sampler.csv"
    options = "--batch 2 3 --draft-len 2 --vocab 90 --repeats 1 --label here --csv".split()
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), *options, str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "<class 'skd_bench.Any'>", "a stand-in, and not what is installed"
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["requests"] for line in lines] == ["2", "3"] and {line["label"] for line in lines} == {"here"}
    for line in lines:
        assert 0 <= float(line["kept"]) <= 1 and float(line["ms_a_verify_step"]) > 0
        assert line["waits_a_verify_step"] == "", "nothing waits for a CPU"
        assert 100 < int(line["operators_a_step"]) < 600
