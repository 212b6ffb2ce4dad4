"""What finished runs measured, a row a run."""

from __future__ import annotations

from csv import DictReader, DictWriter
from itertools import pairwise
from pathlib import Path
from typing import Any

from plan import Plan, Run

from skd_plugin.config.run import Run as Config
from skd_plugin.run_folder import RunFolder

Row = dict[str, Any]
NAMES = ("task", "start", "method")  # columns of a table that hold no numbers


def runs_table(plan: Plan, folder: Path) -> list[Row]:
    """Rows of the runs that have come to their end."""
    folders = ((run, RunFolder(folder / run.name)) for run in plan.runs())
    return [row_of(run, plan, its) for run, its in folders if its.model.is_dir()]


def row_of(run: Run, plan: Plan, folder: RunFolder) -> Row:
    """Seconds are those of roll-outs and updates, without start, evaluations and checkpoints."""
    records = folder.metrics.read()
    config = Config.load(folder)
    steps = [record for record in records if "skd/kd_coef" in record]
    evaluations = [record for record in records if f"eval/{run.task}/kl" in record]
    last, first = evaluations[-1], evaluations[0]
    host = config.host
    batch = host["rollout.batch_size"] * host["rollout.n_samples_per_prompt"]
    updates = batch // host["train.batch_size"] * host["train.max_epochs"]  # a step
    score = f"eval/{run.task}/{plan.metric_of(run.cell)}"
    of_teacher = f"eval/{run.task}/teacher_{plan.metric_of(run.cell)}"
    teacher = [record[of_teacher] for record in records if of_teacher in record]
    return {
        "task": run.task,
        "start": run.start,
        "method": run.method,
        "seed": run.seed,
        "score": last[score],
        "kl": last[f"eval/{run.task}/kl"],
        "response_len": last[f"eval/{run.task}/response_len"],
        "score_at_start": first[score] if first["step"] == 0 else None,
        "kl_at_start": first[f"eval/{run.task}/kl"] if first["step"] == 0 else None,
        "teacher_score": teacher[0] if teacher else None,
        "updates": len(steps) * updates,
        **_spent(steps, config),
        "rollout_s": round(sum(record["time/rollout"] for record in steps), 2),
        "train_s": round(sum(record["time/train"] for record in steps), 2),
        "accepted_first": steps[0]["skd/accept_rate"],
        "accepted_last": steps[-1]["skd/accept_rate"],
        **_others(run, plan, evaluations),
    }


def _others(run: Run, plan: Plan, evaluations: list[dict[str, float]]) -> dict[str, float | None]:
    """Scores of tasks that the run was not trained on, behind it and before."""
    last, first = evaluations[-1], evaluations[0]
    found: dict[str, float | None] = {}
    for task, metric in plan.tasks[run.task].others.items():
        found[f"score_{task}"] = last[f"eval/{task}/{metric}"]
        found[f"score_{task}_at_start"] = first[f"eval/{task}/{metric}"] if first["step"] == 0 else None
    return found


def curves_table(plan: Plan, folder: Path) -> list[Row]:
    """Every evaluation of the students, with what their training had cost by then."""
    folders = ((run, RunFolder(folder / run.name)) for run in plan.runs())
    return [row for run, its in folders if its.model.is_dir() for row in _curve(run, plan, its)]


def _curve(run: Run, plan: Plan, folder: RunFolder) -> list[Row]:
    records, config = folder.metrics.read(), Config.load(folder)
    steps = {record["step"]: record for record in records if "skd/kd_coef" in record}
    rows = []
    for record in records:
        if f"eval/{run.task}/kl" in record:
            until = [steps[step] for step in sorted(steps) if step <= record["step"]]
            spent = _spent(until, config)
            own = {"task": run.task, "start": run.start, "method": run.method, "seed": run.seed}
            keys = {"score": plan.metric_of(run.cell), "kl": "kl"}
            measured = {key: record[f"eval/{run.task}/{name}"] for key, name in keys.items()}
            rows.append({**own, "step": record["step"], **measured, **spent})
    return rows


def _spent(steps: list[dict[str, float]], config: Config) -> dict[str, int]:
    """Tokens of responses; positions at which the teacher computed a distribution; proposals of the student. A block
    of draft_len proposals takes draft_len + 1 positions.
    """
    draft_len = config.skd.rollout.most_drafts
    batch = config.host["rollout.batch_size"] * config.host["rollout.n_samples_per_prompt"]
    tokens = [batch * record["skd/response_len"] for record in steps]
    drafts = [
        count * (1 - record["skd/undrafted_frac"]) / (1 - record["skd/draft_waste"])
        for count, record in zip(tokens, steps, strict=True)
    ]
    return {
        "tokens": round(sum(tokens)),
        "teacher_tokens": round(sum(drafts) * (draft_len + 1) / draft_len),
        "student_tokens": round(sum(drafts)),
    }


def at_equal_cost(curves: list[Row], cost: str) -> list[Row]:
    """A row a run of a cell: score and KL where each method has spent as much as the thriftiest one of its seed has in
    all, on the line between the two evaluations around that point. Runs with a single evaluation have no such line.
    """
    starts = {(row["task"], row["start"], row["seed"]): row for row in curves if row["step"] == 0}
    runs: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in curves:
        start = starts.get((row["task"], row["start"], row["seed"]))  # measured with one method only
        known = runs.setdefault((row["task"], row["start"], row["method"], row["seed"]), [start] if start else [])
        known += [row] if row["step"] else []
    rows = []
    for (task, start, method, seed), curve in runs.items():
        beside = [c for (t, s, _, n), c in runs.items() if (t, s, n) == (task, start, seed)]
        budget = min(max(row[cost] for row in c) for c in beside)
        for before, after in pairwise(curve):
            if before[cost] <= budget <= after[cost] and after[cost] > before[cost]:
                part = (budget - before[cost]) / (after[cost] - before[cost])
                values = {key: before[key] + part * (after[key] - before[key]) for key in ("score", "kl")}
                rows.append({"task": task, "start": start, "method": method, "seed": seed, **values})
                break
    return rows


def chosen(table: list[Row], cell: str, method: str) -> list[Row]:
    """Rows of a cell and a method, by seed."""
    task, start = cell.split("/")
    rows = [r for r in table if (r["task"], r["start"], r["method"]) == (task, start, method)]
    return sorted(rows, key=lambda row: row["seed"])


def known(rows: list[Row], key: str) -> list[float]:
    """Its values in those of the rows in which it was measured."""
    return [row[key] for row in rows if row[key] is not None]


def write_csv(path: Path, rows: list[Row]) -> None:
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote; empty where it wrote no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {key: value if key in NAMES else _number(value) for key, value in row.items()} for row in DictReader(file)
        ]


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
