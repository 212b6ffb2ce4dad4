"""A step of training beside TRL's: the same prompts, models, batch, lengths and loss, in turns.

    python scripts/bench_step.py                       # TRL goes into .cache/trl, beside this environment's torch
    python scripts/bench_step.py --trl-python PYTHON   # one that has it
    python scripts/bench_step.py --draw                # only the picture and the table, of the CSV that is there

Ours is `skd train` on recipes/quickstart.yaml: 64 prompts, responses of up to 96 tokens, one update, KL(p‖q), float32.
TRL's DistillationTrainer does the same on-policy, with transformers' generate and beta 0, which is that divergence.
Each repeat starts both anew, and takes the median over its steps but the first ones. A step is from the end of one to
the end of the next: sampling, update, and for us the weights' way into the engine. Ratios are of the two that ran in
one turn, which share whatever else the machine does.

Writes results/speed/step.csv, one line a turn, and step.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "speed"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
TRL = ("trl==1.16.0", "accelerate==1.15.0")
BATCH, MICRO_BATCH, NEW_TOKENS, LEARNING_RATE = 64, 32, 96, 1.5e-3  # the recipe's
WARM_UP = 3  # steps that are not counted
COLUMNS = ("turn", "trainer", "step_s", "tokens", "tokens_per_s", "host")


def our_steps(folder: Path, steps: int, options: list[str]) -> list[dict[str, float]]:
    """Seconds and response tokens of each step of a run of ours."""
    arguments = [
        f"skd.run_dir={folder}",
        f"skd.task.train_prompts={BATCH * steps}",
        "skd.task.eval_prompts=8",
        "skd.eval.teacher=false",
        "skd.eval.at_start=false",
        *options,
    ]
    run = "import sys; from skd_plugin.cli import main; sys.exit(main())"
    # Ray gives way to everything else on a machine (niceness 15), which TRL does not.
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    call([sys.executable, "-c", run, "train", str(RECIPE), *arguments], environment)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step_s": record["time/step"], "tokens": BATCH * record["skd/response_len"]}
        for record in records
        if "skd/loss" in record
    ]


def trl_steps(python: Path, prompts: Path, models: Path, steps: int) -> list[dict[str, float]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as told:
        job = {"prompts": str(prompts), "models": str(models), "steps": steps, "out": told.name}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        call([str(python), __file__, "--as-trl", json.dumps(job)], environment)
        return json.loads(Path(told.name).read_text())


def call(command: list[str], environment: Any) -> None:
    """Raises SystemExit with the end of what it has printed where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")


def run_trl(job: dict[str, Any]) -> None:
    """In the environment that has TRL."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer  # type: ignore[import-not-found]

    ends: list[float] = []
    counted: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    class Counting(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            counted.append(float(made["completion_mask"].sum()))
            return made

    student, teacher = (f"{job['models']}/{name}" for name in ("student", "teacher"))
    lines = Path(job["prompts"]).read_text().splitlines()
    prompts = [json.loads(line)["input"] for line in lines][: BATCH * job["steps"]]
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            max_completion_length=NEW_TOKENS,
            max_steps=job["steps"],
            learning_rate=LEARNING_RATE,
            beta=0.0,  # KL(p‖q)
            temperature=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            teacher_model_init_kwargs={"dtype": "float32"},
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Counting(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(student, padding_side="left"),
            callbacks=[Watch()],
        )
        ends.append(time.perf_counter())
        trainer.train()
    seconds = [after - before for before, after in pairwise(ends)]
    steps = [{"step_s": one, "tokens": tokens} for one, tokens in zip(seconds, counted, strict=True)]
    Path(job["out"]).write_text(json.dumps(steps))


def make_trl(folder: Path) -> Path:
    """An environment with TRL that borrows all else from this one: both then run the same torch and transformers."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        target = ["--no-deps", "--target", str(own), *TRL]
        uv = shutil.which("uv")
        pip = [uv, "pip", "install"] if uv else [sys.executable, "-m", "pip", "install"]
        call([*pip, *target], os.environ)
    return python


def measure(python: Path, steps: int, turns: int, options: list[str]) -> Iterator[dict[str, Any]]:
    """Lines of the table, as they are measured."""
    host = f"{os.cpu_count()} cores"
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            taken = {"ours": our_steps(folder, steps, options)}
            prompts, models = folder / "data" / "train.jsonl", ROOT / "recipes" / "models" / "arithmetic"
            taken["trl"] = trl_steps(python, prompts, models, steps)
        for trainer, of_steps in taken.items():
            step_s, tokens = (median(one[name] for one in of_steps[WARM_UP:]) for name in ("step_s", "tokens"))
            yield dict(zip(COLUMNS, (turn, trainer, step_s, tokens, tokens / step_s, host), strict=True))


def ratios(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of TRL's step over ours, of each turn."""
    seconds = {(row["turn"], row["trainer"]): float(row["step_s"]) for row in rows}
    own = {turn: of_turn for (turn, trainer), of_turn in seconds.items() if trainer == "ours"}
    return [seconds[turn, "trl"] / of_turn for turn, of_turn in own.items() if (turn, "trl") in seconds]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3))
    for place, trainer in enumerate(("ours", "trl")):
        seconds = [float(row["step_s"]) for row in rows if row["trainer"] == trainer]
        axis.bar(place, median(seconds), width=0.6)
        axis.plot([place] * len(seconds), seconds, "k.")
    axis.set_xticks([0, 1], ["skd train", "TRL DistillationTrainer"])
    axis.set_ylabel("seconds a step")
    axis.set_title("64 prompts, quickstart pair")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trl-python", type=Path, help="python of an environment with TRL")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help=f"of each turn; the first {WARM_UP} are not counted")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--as-trl", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="of skd train, as skd.rollout.draft_len=4")
    options = parser.parse_args()
    if options.as_trl:
        return run_trl(options.as_trl)
    table = options.out / "step.csv"
    if not options.draw:
        python = options.trl_python or make_trl(ROOT / ".cache" / "trl")
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in measure(python, options.steps, options.turns, options.options):
                writer.writerow({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()})
                file.flush()
                print(row, flush=True)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = ratios(rows)
    print(f"a step of TRL's takes {median(found):.2f} of ours ({min(found):.2f} to {max(found):.2f})")
    draw(rows, options.out / "step.png")


if __name__ == "__main__":
    main()
