"""A step of training beside TRL's: the same prompts, models, batch, lengths and loss, in turns.

    python scripts/bench_step.py                       # TRL goes into .cache/trl, beside this environment's torch
    python scripts/bench_step.py --pair smollm2 --turns 1 --steps 4     # after scripts/make_smollm2_pair.py
    python scripts/bench_step.py skd.rollout.draft_len=4                # with other options of `skd train`
    python scripts/bench_step.py --draw                # only the picture and the ratios, of the CSV that is there

Ours is `skd train` on recipes/quickstart.yaml: 64 prompts, responses of up to 96 tokens, one update, KL(p‖q), float32;
with `--pair smollm2` on recipes/smollm2.yaml, 64 prompts and up to 48 tokens too. TRL's DistillationTrainer and its
GKDTrainer do the same on-policy, with transformers' generate and beta 0, which is that divergence. Each repeat starts
all of them anew, and takes the median over its steps but the first ones. A step is from the end of one to the end of
the next: sampling, update, and for us the weights' way into the engine. Ratios are of those that ran in one turn and
share whatever else the machine does. Responses end where their model ends them, so that the tokens differ.

Ours has a thread a process, or as many as OMP_NUM_THREADS says; TRL has what torch takes, which is all cores.

Writes results/speed/step.csv, one line a turn and trainer, in place of the lines of the same pair, and step.png.
"""

from __future__ import annotations

import argparse
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
from typing import Any, NamedTuple

from measured import read, write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "speed"
TRL = ("trl==1.16.0", "accelerate==1.15.0")
TRAINERS = ("distillation", "gkd")  # of TRL
BATCH = 64
COLUMNS = ("pair", "turn", "trainer", "options", "threads", "step_s", "tokens", "tokens_per_s")


class Pair(NamedTuple):
    """Two models, and how their recipe trains them."""

    models: Path
    recipe: str
    micro_batch: int
    new_tokens: int
    learning_rate: float
    warm_up: int  # steps that are not counted

    def options(self, steps: int) -> list[str]:
        """Of `skd train`, for so many steps and nothing else."""
        if self.recipe == "quickstart.yaml":
            prompts = [f"skd.task.train_prompts={BATCH * steps}", "skd.task.eval_prompts=8", "skd.eval.teacher=false"]
        else:
            batches = [f"openrlhf.{part}.batch_size={BATCH}" for part in ("rollout", "train")]
            prompts = [f"openrlhf.data.max_samples={BATCH * steps}", *batches]
        return [*prompts, "skd.eval.at_start=false", "openrlhf.eval.steps=-1"]


PAIRS = {
    "quickstart": Pair(ROOT / "recipes" / "models" / "arithmetic", "quickstart.yaml", 32, 96, 1.5e-3, 3),
    "smollm2": Pair(ROOT / ".cache" / "smollm2", "smollm2.yaml", 8, 48, 5e-4, 1),
}


def our_steps(pair: Pair, folder: Path, steps: int, options: list[str]) -> list[dict[str, float]]:
    """Seconds and response tokens of each step of a run of ours."""
    arguments = [f"skd.run_dir={folder}", *pair.options(steps), *options]
    run = "import sys; from skd_plugin.cli import main; sys.exit(main())"
    # Ray gives way to everything else on a machine (niceness 15), which TRL does not.
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    call([sys.executable, "-c", run, "train", str(ROOT / "recipes" / pair.recipe), *arguments], environment)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step_s": record["time/step"], "tokens": BATCH * record["skd/response_len"]}
        for record in records
        if "skd/loss" in record
    ]


def trl_steps(python: Path, job: dict[str, Any]) -> list[dict[str, float]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as told:
        own = ("PYTHONPATH", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in own}
        call([str(python), __file__, "--as-trl", json.dumps({**job, "out": told.name})], environment)
        return json.loads(Path(told.name).read_text())


def call(command: list[str], environment: Any) -> None:
    """Raises SystemExit with the end of what it has printed where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")


def run_trl(job: dict[str, Any]) -> None:
    """In the environment that has TRL."""
    from transformers import AutoTokenizer, TrainerCallback

    pair = PAIRS[job["pair"]]
    ends: list[float] = []
    counted: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(pair.models / "student", padding_side="left")
    lines = Path(job["prompts"]).read_text().splitlines()
    texts = [json.loads(line)["input"] for line in lines][: BATCH * job["steps"]]
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": pair.micro_batch,
            "gradient_accumulation_steps": BATCH // pair.micro_batch,
            "max_steps": job["steps"],
            "learning_rate": pair.learning_rate,
            "beta": 0.0,  # KL(p‖q)
            "temperature": 1.0,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "float32"},
            "teacher_model_init_kwargs": {"dtype": "float32"},
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        make = distillation_trainer if job["trainer"] == "distillation" else gkd_trainer
        trainer = make(pair, common, texts, tokenizer, counted)
        trainer.add_callback(Watch())
        ends.append(time.perf_counter())
        trainer.train()
    seconds = [after - before for before, after in pairwise(ends)]
    in_step = len(counted) // len(seconds)  # a step is all of these at once, or one a micro-batch
    tokens = [sum(counted[place * in_step : (place + 1) * in_step]) for place in range(len(seconds))]
    steps = [{"step_s": one, "tokens": number} for one, number in zip(seconds, tokens, strict=True)]
    Path(job["out"]).write_text(json.dumps(steps))


def distillation_trainer(
    pair: Pair, common: dict[str, Any], texts: list[str], tokenizer: Any, counted: list[float]
) -> Any:
    """Args: counted: gets the response tokens of each batch."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl import DistillationConfig, DistillationTrainer  # type: ignore[import-not-found]

    class Counting(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            counted.append(float(made["completion_mask"].sum()))
            return made

    return Counting(
        model=str(pair.models / "student"),
        teacher_model=str(pair.models / "teacher"),
        args=DistillationConfig(**common, max_completion_length=pair.new_tokens),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
    )


def gkd_trainer(pair: Pair, common: dict[str, Any], texts: list[str], tokenizer: Any, counted: list[float]) -> Any:
    """Args: counted: gets the response tokens of each micro-batch."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # type: ignore[import-not-found]

    class Counting(GKDTrainer):  # type: ignore[misc]
        @staticmethod
        def generate_on_policy_outputs(*args: Any, **kwargs: Any) -> Any:
            made = GKDTrainer.generate_on_policy_outputs(*args, **kwargs)
            counted.append(float((made[2] != -100).sum()))
            return made

    # Of references it only takes the number of tokens, by which it divides the loss.
    reference = [tokenizer.eos_token_id] * (pair.new_tokens // 2)
    ids = [own + reference for own in tokenizer(texts, add_special_tokens=False).input_ids]
    return Counting(
        model=str(pair.models / "student"),
        teacher_model=str(pair.models / "teacher"),
        args=GKDConfig(**common, max_new_tokens=pair.new_tokens, lmbda=1.0),
        train_dataset=Dataset.from_dict({"prompt": texts, "input_ids": ids}),
        processing_class=tokenizer,
    )


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


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of the table, as they are measured."""
    pair = PAIRS[given.pair]
    python = given.trl_python or make_trl(ROOT / ".cache" / "trl")
    threads = {"ours": os.environ.get("OMP_NUM_THREADS", "1")}
    for turn in range(given.turns):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            taken = {"ours": our_steps(pair, folder, given.steps, given.options)}
            own = folder / "data" / "train.jsonl"  # of a task
            prompts = own if own.exists() else pair.models / "train.jsonl"
            for trainer in given.beside:
                job = {"pair": given.pair, "prompts": str(prompts), "steps": given.steps, "trainer": trainer}
                taken[trainer] = trl_steps(python, job)
        for trainer, of_steps in taken.items():
            step_s, tokens = (median(one[name] for one in of_steps[pair.warm_up :]) for name in ("step_s", "tokens"))
            told = " ".join(given.options) if trainer == "ours" else ""
            row = (given.pair, turn, trainer, told, threads.get(trainer, os.cpu_count()), step_s, tokens)
            yield dict(zip(COLUMNS, (*row, tokens / step_s), strict=True))


def ratios(rows: list[dict[str, Any]], pair: str, trainer: str) -> list[float]:
    """Seconds of a step of TRL's trainer over ours, of each turn that has both."""
    seconds = {(row["turn"], row["trainer"]): float(row["step_s"]) for row in rows if row["pair"] == pair}
    own = {turn: of_turn for (turn, name), of_turn in seconds.items() if name == "ours"}
    return [seconds[turn, trainer] / of_turn for turn, of_turn in own.items() if (turn, trainer) in seconds]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    pairs = [pair for pair in PAIRS if any(row["pair"] == pair for row in rows)]
    figure, axes = plt.subplots(1, len(pairs), figsize=(4.5 * len(pairs), 3), squeeze=False)
    for axis, pair in zip(axes[0], pairs, strict=True):
        for place, trainer in enumerate(("ours", *TRAINERS)):
            of_trainer = [row for row in rows if row["pair"] == pair and row["trainer"] == trainer]
            seconds = [float(row["step_s"]) for row in of_trainer]
            if seconds:
                axis.bar(place, median(seconds), width=0.6)
                axis.plot([place] * len(seconds), seconds, "k.")
        axis.set_xticks(range(3), ["skd train", "TRL\nDistillationTrainer", "TRL\nGKDTrainer"], fontsize=8)
        axis.set_ylabel("seconds a step")
        axis.set_title(f"{BATCH} prompts, {pair} pair")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pair", choices=[*PAIRS], default="quickstart")
    parser.add_argument("--beside", nargs="+", choices=TRAINERS, default=[*TRAINERS], help="of TRL")
    parser.add_argument("--trl-python", type=Path, help="python of an environment with TRL")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each turn; the first are not counted")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--as-trl", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="of skd train, as skd.rollout.draft_len=4")
    given = parser.parse_args()
    if given.as_trl:
        return run_trl(given.as_trl)
    table = given.out / "step.csv"
    rows = read(table)
    if not given.draw:
        rows = write(table, COLUMNS, measure(given), keep=[row for row in rows if row["pair"] != given.pair])
    for pair in PAIRS:
        for trainer in TRAINERS:
            if found := ratios(rows, pair, trainer):
                spread = f"({min(found):.2f} to {max(found):.2f})"
                print(f"{pair}: a step of TRL's {trainer} takes {median(found):.2f} of ours {spread}")
    draw(rows, given.out / "step.png")


if __name__ == "__main__":
    main()
