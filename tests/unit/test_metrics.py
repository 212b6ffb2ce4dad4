"""The metrics of a step, each against a count made by hand or by brute force."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import torch

from skd_plugin.core import metrics as table
from skd_plugin.core.metrics import EVALUATIONS, METRICS, figures_of, metric_of
from skd_plugin.core.trace import NOTHING, Source, Trace

NAN = float("nan")
# SAME: replaced by the very token proposed; LOST: a token of a reference after a preemption, which nobody drafted.
KEPT, SWAPPED, SAME, UNKNOWN = "kept swapped same unknown".split()
GIVEN, LOST, AGAIN, MARKED, LED = "given lost again marked led".split()


def make_trace(kinds: list[str], topk_mass: float = 0.75, kl: float = 0.5) -> Trace:
    count = len(kinds)
    drafted = torch.tensor([kind not in (UNKNOWN, LOST) for kind in kinds], dtype=torch.bool)
    codes = {KEPT: Source.ACCEPTED, SWAPPED: Source.REPLACED, SAME: Source.REPLACED, UNKNOWN: Source.UNDRAFTED}
    codes |= {GIVEN: Source.REFERENCE, LOST: Source.REFERENCE, AGAIN: Source.RESAMPLED, MARKED: Source.FLAGGED}
    codes |= {LED: Source.HANDED}
    rejected = {kind: NOTHING for kind in codes} | {SWAPPED: 9, SAME: 5, AGAIN: 9, MARKED: 5, LED: 9}
    known = torch.where(drafted, 1.0, NAN)
    return Trace(
        response_ids=torch.full((count,), 5, dtype=torch.int32),
        source=torch.tensor([codes[kind] for kind in kinds], dtype=torch.uint8),
        rejected_ids=torch.tensor([rejected[kind] for kind in kinds], dtype=torch.int32),
        draft_rank=torch.where(drafted, 0, NOTHING).to(torch.int32),
        student_logp=-2 * known,
        teacher_logp=torch.full((count,), -1.5),
        kl=kl * known,
        student_entropy=3 * known,
        teacher_entropy=torch.full((count,), 1.25),
        top_overlap=0.4 * known,
        same_first=torch.where(drafted, torch.arange(count) % 2, NAN),
        teacher_topk_ids=torch.zeros(count, 2, dtype=torch.int32),
        teacher_topk_logp=torch.full((count, 2), topk_mass / 2).log(),
        teacher_rest_tempered=torch.full((count,), 1 - topk_mass).log(),
    )


def rollout_metrics(traces: list[Trace], draft_len: int) -> dict[str, float]:
    return table.rollout_metrics([figures_of(trace, draft_len) for trace in traces])


def draft_waste(traces: list[Trace], draft_len: int) -> float:
    return metric_of("skd/draft_waste", [figures_of(trace, draft_len) for trace in traces])


def test_metrics_of_two_responses() -> None:
    """Token means weigh every token the same, so the longer response weighs more."""
    traces = [make_trace([KEPT, SWAPPED, UNKNOWN, KEPT]), make_trace([KEPT], topk_mass=0.25)]
    metrics = rollout_metrics(traces, draft_len=2)
    assert metrics["skd/accept_rate"] == 3 / 4  # of the drafted ones
    assert metrics["skd/replaced_frac"] == pytest.approx(1 / 5)
    assert metrics["skd/undrafted_frac"] == pytest.approx(1 / 5)
    assert metrics["skd/first_replaced_pos"] == (1 + 1) / 2  # one that has none counts its length
    assert metrics["skd/teacher_nll"] == pytest.approx(1.5)
    assert metrics["skd/teacher_topk_mass"] == pytest.approx((4 * 0.75 + 0.25) / 5)
    assert metrics["skd/student_entropy"] == pytest.approx(3.0)
    assert metrics["skd/teacher_entropy"] == pytest.approx(1.25)
    assert metrics["skd/top_overlap"] == pytest.approx(0.4) and metrics["skd/same_first"] == pytest.approx(2 / 4)
    assert metrics["skd/response_len"] == 5 / 2


def test_origins_that_not_every_run_has() -> None:
    """Shares of ten tokens; references are no proposals, whoever drafted them."""
    kinds = [GIVEN, GIVEN, LOST, KEPT, KEPT, AGAIN, AGAIN, MARKED, SWAPPED, UNKNOWN]
    metrics = rollout_metrics([make_trace(kinds)], draft_len=2)
    assert metrics["skd/accept_rate"] == pytest.approx(2 / 6)
    for name, count in {"reference": 3, "resampled": 2, "flagged": 1, "replaced": 1, "undrafted": 1}.items():
        assert metrics[f"skd/{name}_frac"] == pytest.approx(count / 10), name
    plain = rollout_metrics([make_trace([KEPT, SWAPPED])], draft_len=2)
    assert not {"skd/reference_frac", "skd/resampled_frac", "skd/flagged_frac"} & set(plain)


def test_a_leg_of_the_teacher_is_put_to_no_gate() -> None:
    metrics = rollout_metrics([make_trace([KEPT, SWAPPED, LED, LED, LED])], draft_len=2)
    assert metrics["skd/accept_rate"] == 1 / 2 and metrics["skd/handed_frac"] == pytest.approx(3 / 5)


def test_a_reference_has_no_rate_of_acceptance() -> None:
    assert math.isnan(rollout_metrics([make_trace([GIVEN, GIVEN])], draft_len=2)["skd/accept_rate"])


def test_no_token_no_metrics() -> None:
    assert rollout_metrics([Trace.empty(2)], draft_len=2) == {}


def test_unknown_student_is_not_zero() -> None:
    """Where the student proposed nothing there is no entropy and no KL; a mean over nothing is NaN."""
    metrics = rollout_metrics([make_trace([UNKNOWN, UNKNOWN])], draft_len=2)
    assert math.isnan(metrics["skd/accept_rate"]) and metrics["skd/undrafted_frac"] == 1
    assert math.isnan(metrics["skd/student_entropy"]) and math.isnan(metrics["skd/kl"])


def test_mean_kl_is_a_token_mean_of_the_known() -> None:
    traces = [make_trace([KEPT, UNKNOWN, SWAPPED], kl=0.5), make_trace([KEPT], kl=2.0)]
    assert rollout_metrics(traces, draft_len=2)["skd/kl"] == pytest.approx((0.5 + 0.5 + 2.0) / 3)


def test_sums_of_responses_are_the_sums_of_all_their_tokens() -> None:
    """What each response adds is counted apart. Together it is what one response of all their tokens would say, but
    for what counts responses and blocks; to the last digit the same in whatever order they come.
    """
    rng = random.Random(0)
    kinds = [[rng.choice([KEPT, SWAPPED, UNKNOWN, GIVEN, AGAIN]) for _ in range(rng.randint(0, 9))] for _ in range(30)]
    traces = [make_trace(one, topk_mass=rng.random(), kl=rng.random()) for one in kinds]
    apart, whole = rollout_metrics(traces, draft_len=2), rollout_metrics([Trace.join(traces)], draft_len=2)
    of_responses = {"skd/response_len", "skd/first_replaced_pos", "skd/draft_waste"}
    assert {name: apart[name] for name in apart if name not in of_responses} == pytest.approx(
        {name: whole[name] for name in whole if name not in of_responses}
    )
    rng.shuffle(traces)
    assert rollout_metrics(traces, draft_len=2) == apart


def rollout(rng: random.Random, draft_len: int, length: int) -> tuple[list[str], int, int]:
    """Plays the engine block by block: kinds of the emitted tokens, number of drafted ones, of those thrown away."""
    kinds: list[str] = []
    drafted = thrown = 0
    while len(kinds) < length:
        block = [
            rng.choices([KEPT, SWAPPED, SAME, AGAIN, MARKED, GIVEN], [5, 1, 1, 1, 1, 1])[0] for _ in range(draft_len)
        ]
        drafted += draft_len
        end = next((place for place, kind in enumerate(block, 1) if kind in (SWAPPED, AGAIN)), draft_len)
        emitted = block[:end][: length - len(kinds)]
        thrown += draft_len - len(emitted)
        kinds += emitted
    return kinds, drafted, thrown


@pytest.mark.parametrize("draft_len", [1, 2, 5])
def test_draft_waste_is_what_a_played_engine_throws_away(draft_len: int) -> None:
    rng = random.Random(draft_len)
    traces, drafted, thrown = [], 0, 0
    for _ in range(50):
        kinds, more_drafted, more_thrown = rollout(rng, draft_len, rng.randint(1, 20))
        traces.append(make_trace(kinds))
        drafted, thrown = drafted + more_drafted, thrown + more_thrown
    assert draft_waste(traces, draft_len) == pytest.approx(thrown / drafted)


def test_draft_waste_by_hand() -> None:
    assert draft_waste([make_trace([KEPT, KEPT, KEPT])], 3) == 0
    assert draft_waste([make_trace([SWAPPED, KEPT, KEPT, KEPT])], 3) == pytest.approx(2 / 6)
    assert draft_waste([make_trace([KEPT])], 3) == pytest.approx(2 / 3)
    assert draft_waste([make_trace([SAME, KEPT, KEPT])], 3) == 0  # the block goes on after an equal token
    assert draft_waste([Trace.empty(2)], 3) == 0


def test_undrafted_token_is_no_draft() -> None:
    """Two blocks of three are drafted, around one token that nobody proposed; two drafts are thrown away."""
    kinds = [SWAPPED, UNKNOWN, KEPT, KEPT, KEPT]
    assert draft_waste([make_trace(kinds)], 3) == pytest.approx(2 / 6)


ROOT = Path(__file__).parents[2]


def test_pages_name_every_metric_and_no_other() -> None:
    """The tables of docs/reference.md and the list of docs/rlhf.md."""
    text = ""
    for page in ("reference.md", "rlhf.md"):
        text += (ROOT / "docs" / page).read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:\w+/)?\w+)`", text)) - {"metrics.jsonl"}
    named = {name for name in named if name in METRICS or name.partition("/")[0] in ("skd", "rl", "time")}
    assert named == set(METRICS)
    evaluated = set(re.findall(r"`eval/<task>/(\w+)`", text))
    assert evaluated and evaluated <= set(EVALUATIONS)


def test_every_metric_of_a_step_is_in_the_table() -> None:
    """Also those that a trace tells only sometimes; each has words for people."""
    kinds = [GIVEN, KEPT, AGAIN, MARKED, SWAPPED, UNKNOWN, LED]
    told = {name for name, metric in METRICS.items() if metric.ratio}
    assert set(rollout_metrics([make_trace(kinds)], draft_len=2)) == told
    for name, metric in {**METRICS, **EVALUATIONS}.items():
        assert metric.name == name and metric.title and metric.better in (None, "low", "high")
