"""results/README.md: the tables, with what a reader must know to read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from collect import Row, at_equal_cost, chosen, known
from differences import differences, smallest
from finished import START, TEACHER
from interval import Interval
from plan import Plan

COST = ("teacher_tokens", "student_tokens")


def write_page(plan: Plan, table: list[Row], curves: list[Row], finished: list[Row], path: Path) -> None:
    """The text between the tables is below the mark in the page that is there already, and is kept."""
    kept = path.read_text().partition(MARK)[0] if path.exists() else "# Results\n\n"
    path.write_text(kept + MARK + "\n\n" + "\n".join(_sections(plan, table, curves, finished)))


MARK = "<!-- Below: written by scripts/compare.sh -->"


def _sections(plan: Plan, table: list[Row], curves: list[Row], finished: list[Row]) -> list[str]:
    lines = ["![differences between methods](differences.png)", "", "![score by method](comparison.png)", ""]
    lines += _overview(plan, table, "score", "Score", _percent) + _overview(
        plan, table, "kl", "KL(p‖q), nats a token", _plain
    )
    for cell in plan.comparison.cells:
        lines += [f"## {cell.replace('/', ', ')} start", "", *_comparison(plan, table, cell)]
        lines += [*_differences(plan, table, curves, cell), "", *_others(plan, table, cell)]
    if plan.finished is not None and finished:
        lines += ["## The finished students", ""]
        for cell in plan.finished.cells:
            lines += [*_finished(plan, finished, cell), ""]
    if plan.sweep is not None and plan.sweep.cells:
        lines += [f"## {plan.sweep.title}", "", "![sweep](sweep.png)", ""]
        for cell in plan.sweep.cells:
            lines += [*_sweep(plan, table, cell), ""]
    if plan.adaptivity is not None and plan.adaptivity.cells:
        lines += ["## Acceptance over training", "", "![adaptivity](adaptivity.png)", ""]
    return [*lines, "## Cost", "", "![cost](cost.png)", ""]


def _overview(plan: Plan, table: list[Row], key: str, title: str, written: Callable[..., str]) -> list[str]:
    """All cells beside each other; the best mean of a cell is bold."""
    cells, methods = plan.comparison.cells, plan.comparison.methods
    values = {(m, c): [row[key] for row in chosen(table, c, m)] for m in methods for c in cells}
    better = max if key == "score" else min
    best = {c: better((Interval.of(values[m, c]).mean for m in methods if values[m, c]), default=None) for c in cells}

    def shown(method: str, cell: str) -> str:
        if not values[method, cell]:
            return ""
        text = written(values[method, cell])
        return f"**{text}**" if Interval.of(values[method, cell]).mean == best[cell] else text

    heads = [
        f"{cell.replace('/', ', ')} ({plan.metric_of(cell)})" if key == "score" else cell.replace("/", ", ")
        for cell in cells
    ]
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(cells) + 1) + "|"]
    at_start = [known([row for m in methods for row in chosen(table, c, m)], f"{key}_at_start") for c in cells]
    lines.append(f"| student at the start | {' | '.join(written(v) if v else '' for v in at_start)} |")
    lines += [f"| {plan.methods[m].label} | {' | '.join(shown(m, c) for c in cells)} |" for m in methods]
    return [*lines, ""]


def _comparison(plan: Plan, table: list[Row], cell: str) -> list[str]:
    """What each method came to, and what it cost."""
    everything = [row for method in plan.comparison.methods for row in chosen(table, cell, method)]
    lines = [
        f"| | {plan.metric_of(cell)} | KL | teacher tokens | student tokens | sampling | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, key in (("teacher", "teacher_score"), ("student at the start", "score_at_start")):
        values = known(everything, key)
        kl = known(everything, "kl_at_start") if key == "score_at_start" else []
        if values:
            lines.append(f"| {label} | {_percent(values)} | {_plain(kl) if kl else ''} | | | | |")
    for method in plan.comparison.methods:
        rows = chosen(table, cell, method)
        if not rows:
            continue
        cost = " | ".join(f"{Interval.of([row[key] for row in rows]).mean / 1000:.0f} k" for key in COST)
        seconds = " | ".join(f"{Interval.of([r[key] for r in rows]).mean:.0f} s" for key in ("rollout_s", "train_s"))
        values = f"{_percent([row['score'] for row in rows])} | {_plain([row['kl'] for row in rows])}"
        lines.append(f"| {plan.methods[method].label} | {values} | {cost} | {seconds} |")
    return lines


def _differences(plan: Plan, table: list[Row], curves: list[Row], cell: str) -> list[str]:
    """Against the reference: at equal updates, and at equal cost where evaluations on the way tell."""
    at_updates = {(one.method, one.key): one for one in differences(plan, table, cell)}
    if not at_updates:
        return []
    equal = {cost: differences(plan, at_equal_cost(curves, cost), cell) for cost in ("tokens", "teacher_tokens")}
    equal = {cost: {(d.method, d.key): d for d in found} for cost, found in equal.items() if found}
    metric, reference = plan.metric_of(cell), plan.methods[plan.comparison.against].label
    names = {"tokens": "equal tokens", "teacher_tokens": "equal teacher forwards"}
    heads = [
        f"minus {reference}, same seed",
        metric,
        "p",
        "KL",
        "p",
        *(f"{metric} at {names[cost]}" for cost in equal),
    ]
    lines = ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in dict.fromkeys(method for method, _ in at_updates):
        score, kl = at_updates[method, "score"], at_updates[method, "kl"]
        cells = [_percent(score.values, signed=True), _p(score.p), _plain(kl.values, signed=True), _p(kl.p)]
        for found in equal.values():
            one = found.get((method, "score"))
            cells.append(_percent(one.values, signed=True) if one else "")
        lines.append(f"| {plan.methods[method].label} | {' | '.join(cells)} |")
    return [*lines, "", *_power(plan, table, cell)]


def _power(plan: Plan, table: list[Row], cell: str) -> list[str]:
    score, kl = smallest(plan, table, cell, "score"), smallest(plan, table, cell, "kl")
    if score is None or kl is None:
        return []
    return [
        f"{len(plan.seeds)} seeds find a difference of {100 * score:.1f} points, or of {kl:.4f} nats, four times in "
        "five (paired t-test, 5 % over all differences of the table, the spread as measured). p: corrected for all of "
        "them (Holm)."
    ]


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _others(plan: Plan, table: list[Row], cell: str) -> list[str]:
    """What is left of tasks that the runs were not trained on, each method minus the start of the same seed."""
    others = plan.tasks[cell.split("/")[0]].others
    if not others:
        return []
    methods = [method for method in plan.comparison.methods if chosen(table, cell, method)]
    everything = [row for method in methods for row in chosen(table, cell, method)]
    lines = [f"| not trained on | {' | '.join(f'{task} ({metric})' for task, metric in others.items())} |"]
    lines.append("|---" * (len(others) + 1) + "|")
    starts = {
        task: {r["seed"]: value for r in everything if (value := r[f"score_{task}_at_start"]) is not None}
        for task in others
    }
    lines.append(f"| student at the start | {' | '.join(_percent([*own.values()]) for own in starts.values())} |")
    for method in methods:
        rows = chosen(table, cell, method)
        lost = (_percent([r[f"score_{task}"] - starts[task][r["seed"]] for r in rows], signed=True) for task in others)
        lines.append(f"| {plan.methods[method].label}, minus that | {' | '.join(lost)} |")
    return [*lines, ""]


def _finished(plan: Plan, table: list[Row], cell: str) -> list[str]:
    """As draft models of their teacher, and on a harder task; each method's mean over its seeds."""
    part, harder = plan.finished, plan.finished.harder
    heads = [cell.replace("/", ", "), f"kept in blocks of {part.draft_len}", "tokens a block"]
    heads += [f"{plan.metric_of(cell)} of {harder.stem}"] if harder else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    names = {TEACHER: "teacher", START: START, **{m: plan.methods[m].label for m in plan.comparison.methods}}
    for method, label in names.items():
        if not (rows := chosen(table, cell, method)):
            continue
        kept, block = known(rows, "accepted"), known(rows, "tokens_a_block")
        shown = [_percent(kept) if kept else "", _plain(block, places=2) if block else ""]
        shown += [_percent([row["harder"] for row in rows])] if harder else []
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        f"{part.prompts} held-out prompts. Blocks are those of speculative decoding at temperature 1: the student "
        "proposes, the text is the teacher's, and one token of each block is its own.",
    ]


def _sweep(plan: Plan, table: list[Row], cell: str) -> list[str]:
    metric = plan.metric_of(cell)
    lines = [
        f"| {cell.replace('/', ', ')}: {plan.sweep.title} | {metric} | KL | accepted, first step | last step |",
        "|---|---|---|---|---|",
    ]
    for value, method in plan.sweep.methods.items():
        rows = chosen(table, cell, method)
        if rows:
            accepted = " | ".join(_percent([row[f"accepted_{when}"] for row in rows]) for when in ("first", "last"))
            scores, kl = _percent([row["score"] for row in rows]), _plain([row["kl"] for row in rows])
            lines.append(f"| {value} | {scores} | {kl} | {accepted} |")
    return lines


def _percent(values: list[float], *, signed: bool = False) -> str:
    interval = Interval.of([100 * value for value in values])
    half = "" if interval.half is None else f" ± {interval.half:.1f}"
    return f"{interval.mean:{'+' if signed else ''}.1f}{half} %"


def _plain(values: list[float], *, signed: bool = False, places: int = 4) -> str:
    interval = Interval.of(values)
    half = "" if interval.half is None else f" ± {interval.half:.{places}f}"
    return f"{interval.mean:{'+' if signed else ''}.{places}f}{half}"
