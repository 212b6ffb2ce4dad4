"""The teacher's legs against an automaton in plain Python, and their text against the law of speculative sampling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.config.schema import parse_skd
from skd_plugin.core.hand_over import Legs, hand_over, teachers_text
from skd_plugin.core.logit_rows import LogitRows
from skd_plugin.core.proposals import Proposals
from skd_plugin.core.sampling import KEEP_ALL, SamplingSettings, SettingRows
from skd_plugin.core.trace import Source
from skd_plugin.core.verify import Verdict
from skd_plugin.engine.sampling_rule import SamplingRule
from tests.unit.test_gates import VOCAB, proposals

CALM, FLAT = 0, 1  # rows of the teacher's logits: an entropy of almost 0, and one of log V
UNTIL = 0.5


def block_of(fates: list[str], calm: list[bool], own: SamplingSettings) -> tuple[Proposals, Verdict]:
    """A block whose proposals the gate keeps (k), replaces (r) or draws again (a)."""
    count = len(fates)
    logits_NV = torch.zeros(count, VOCAB)
    logits_NV[torch.tensor(calm), 0] = 50.0
    drafts = Proposals(
        draft_N=torch.full((count,), 3),
        teacher=LogitRows.of(logits_NV),
        student=LogitRows.of(torch.zeros(count, VOCAB)),
        position_N=torch.arange(count),
        seed_N=torch.zeros(count, dtype=torch.int64),
        prompt_len_N=torch.zeros(count, dtype=torch.int64),
        settings=SettingRows.of([own] * count, "cpu"),
    )
    codes = {"k": Source.ACCEPTED, "r": Source.REPLACED, "a": Source.RESAMPLED}
    tokens = {"k": 3, "r": 7, "a": 8}
    made = [torch.tensor([table[fate] for fate in fates]) for table in (tokens, codes)]
    return drafts, Verdict(*made, rank_N=torch.zeros(count, dtype=torch.int64))


def slow_states(fates: list[str], calm: list[bool], own: SamplingSettings) -> list[tuple[str, int, int]]:
    """(origin, tokens left, legs begun) of each token: the definition."""
    left = begun = 0
    states = []
    for fate, is_calm in zip(fates, calm, strict=True):
        if left and not (own.hand_over_until >= 0 and is_calm):
            origin, left = "h", left - 1
        elif begun >= own.hand_overs:
            origin, left = "k", 0
        else:
            origin, left = fate, 0
            if fate == "r" and own.hand_over_len:
                left, begun = own.hand_over_len - 1, begun + 1
        states.append((origin, left, begun))
    return states


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    responses=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    size=st.integers(1, 5),
)
def test_states_are_those_of_the_definition_however_a_response_is_cut_into_blocks(data, responses, size):
    cases = []
    for count in responses:
        own = SamplingSettings(
            3,
            hand_over_len=data.draw(st.integers(0, 4)),
            hand_overs=data.draw(st.sampled_from([1, 2, KEEP_ALL])),
            hand_over_until=data.draw(st.sampled_from([-1.0, UNTIL])),
        )
        fates = data.draw(st.lists(st.sampled_from("krka"), min_size=count, max_size=count))
        calm = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        cases.append((fates, calm, own))
    legs = Legs(torch.zeros(len(cases), dtype=torch.int64), torch.zeros(len(cases), dtype=torch.int64))
    letters = {Source.ACCEPTED: "k", Source.REPLACED: "r", Source.RESAMPLED: "a", Source.HANDED: "h"}
    found = [[] for _ in cases]
    for start in range(0, max(responses), size):
        parts, request, place = [], [], []
        for index, (fates, calm, own) in enumerate(cases):
            cut = slice(start, start + size)
            if fates[cut]:
                parts.append((*block_of(fates[cut], calm[cut], own), own))
                request += [index] * len(fates[cut])
                place += range(len(fates[cut]))
        drafts = joined([(part, own) for part, _, own in parts])
        verdict = Verdict(*(torch.cat(x) for x in zip(*(part[1] for part in parts), strict=True)))
        own = drafts.settings, drafts.draft_N
        made, after = hand_over(drafts, *own, verdict, legs, torch.tensor(request), torch.tensor(place))
        for row, index in enumerate(request):
            origin = letters[Source(int(made.source_N[row]))]
            found[index].append((origin, int(after.left[row]), int(after.begun[row])))
            legs.left[index], legs.begun[index] = after.left[row], after.begun[row]
            if origin in "kra":
                assert made.token_N[row] == {"k": 3, "r": 7, "a": 8}[origin]
    assert found == [slow_states(*case) for case in cases]


def joined(parts: list[tuple[Proposals, SamplingSettings]]) -> Proposals:
    names = "draft_N position_N seed_N prompt_len_N".split()
    columns = {name: torch.cat([getattr(part, name) for part, _ in parts]) for name in names}
    columns |= {
        name: LogitRows.of(torch.cat([getattr(part, name).read() for part, _ in parts]))
        for name in ("teacher", "student")
    }
    settings = [own for part, own in parts for _ in part.draft_N]
    return Proposals(**columns, settings=SettingRows.of(settings, "cpu"))


@pytest.mark.parametrize("warp", [{}, {"student_temperature": 0.7, "teacher_temperature": 1.5, "teacher_top_p": 0.9}])
def test_a_leg_has_the_distribution_of_the_teacher(warp):
    """Each token proposed as often as the student would: sum_v q(v) P(w | v proposed) = p(w)."""
    case = proposals(8, 0.0, repeat=4000, **warp)
    p, q = case.teacher_probs_NV[0].double(), case.student_probs_NV[0].double()
    written_N = teachers_text(case)
    found = torch.zeros(VOCAB, dtype=torch.float64).index_add(0, written_N, q[case.draft_N] / 4000)
    torch.testing.assert_close(found, p, atol=0.01, rtol=0)
    kept = (q[case.draft_N] / 4000)[written_N == case.draft_N].sum()
    assert abs(kept - torch.minimum(p, q).sum()) < 0.01 + 1e-9, "no more is thrown away than must be"


def test_a_greedy_teacher_writes_its_first_choice():
    case = proposals(8, 0.0, repeat=50, teacher_temperature=0.0)
    assert (teachers_text(case) == case.teacher_logits_NV[0].argmax()).all()


def test_equal_models_never_throw_a_proposal_away():
    case = proposals(8, 0.0, repeat=50)
    same = replace(case, student=case.teacher)
    assert torch.equal(teachers_text(same), same.draft_N)


def test_a_recipe_gives_the_settings():
    none = SamplingRule.of(RolloutConfig()).settings
    assert (none.hand_over_len, none.hand_overs, none.hand_over_until) == (0, KEEP_ALL, -1.0)
    made = SamplingRule.of(RolloutConfig(hand_over={"tokens": 9, "until_entropy": 0.3})).settings
    assert (made.hand_over_len, made.hand_overs, made.hand_over_until) == (9, 2, 0.3)
    assert SamplingRule.of(RolloutConfig(hand_over={"tokens": 9, "most": None})).settings.hand_overs == KEEP_ALL
    # The student is evaluated alone, and so is the teacher.
    rule = SamplingRule.of(RolloutConfig(hand_over={"tokens": 9}))
    assert rule.student_only(0.0).settings.hand_over_len == rule.teacher_only(0.0).settings.hand_over_len == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rollout": {"method": "on_policy", "hand_over": {"tokens": 3}}}, "hand_over changes a gate, but method"),
        ({"rollout": {"write_back": False, "hand_over": {"tokens": 3}}}, "write_back: false lets it write nothing"),
        ({"loss": {"handed_weight": 0.5}}, "handed_weight = 0.5 has no effect: the teacher has no legs"),
    ],
)
def test_what_would_do_nothing_is_refused(section, message):
    with pytest.raises(Exception, match=message):
        parse_skd({"teacher": {"model_name_or_path": "t"}, **section})


def test_entropy_of_the_rows_of_this_test():
    assert math.log(VOCAB) > UNTIL > 0.01
