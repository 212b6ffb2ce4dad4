"""Scores of prompts and the weights they make, each against its definition in plain Python; and what resumes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from skd_plugin.config.schema import parse_skd
from skd_plugin.core.metrics import Figures, figures_of
from skd_plugin.core.prompt_weights import PROMPT_WEIGHTINGS, PromptWeights, divergence, undecided
from skd_plugin.core.trace import Source, Trace
from skd_plugin.errors import RecipeError
from skd_plugin.host.batch import OptimizerStepBatches
from skd_plugin.host.trace_store import PROMPT_WEIGHT, TRACE_KEY
from tests.traces import trace_of

S, T, R, H = Source.ACCEPTED, Source.REPLACED, Source.REFERENCE, Source.HANDED


def trace(sources: list[Source], kl: list[float] | None = None) -> Trace:
    count = len(sources)
    known = torch.tensor([0.5] * count if kl is None else kl)
    return trace_of(torch.arange(count), source=torch.tensor(sources, dtype=torch.uint8), kl=known)


def response(sources: list[Source], kl: float = 0.5) -> Figures:
    return figures_of(trace(sources, [kl] * len(sources)), 2)


def test_scores_are_their_definitions() -> None:
    score = {name: weighting.score for name, weighting in PROMPT_WEIGHTINGS.items() if weighting.score}
    assert score["acceptance"](response([S, T, H, H, S, S]), 0.0) == pytest.approx(3 / 4)
    assert math.isnan(score["acceptance"](response([R, R]), 0.0))
    assert score["reward"](response([S]), 0.25) == 0.25
    assert score["divergence"](response([S, T], kl=0.7), 0.0) == pytest.approx(1 - math.exp(-0.7))
    unknown = trace([S, T, S], [0.2, math.nan, 0.4])
    assert divergence(figures_of(unknown, 2), 0.0) == pytest.approx(1 - math.exp(-0.3))
    assert [undecided(s) for s in (0.0, 0.25, 0.5, 1.0, 1.7, -2.0)] == pytest.approx([0, 0.75, 1, 0, 0, 0])


def test_a_prompt_is_scored_over_its_responses_and_over_time() -> None:
    weights = PromptWeights("reward", floor=0.2, memory=0.75)
    traces = [response([S])] * 3
    found = weights.weigh(["a", "b", "a"], traces, [1.0, 1.0, 0.0])
    assert found == pytest.approx([1.0, 0.2, 1.0])  # s = 1/2, 1, 1/2
    again = weights.weigh(["b", "c", "a"], traces, [0.0, math.nan, 1.0])
    b, a = 0.75 * 1.0, 0.75 * 0.5 + 0.25 * 1.0
    assert again == pytest.approx([0.2 + 0.8 * 4 * b * (1 - b), 1.0, 0.2 + 0.8 * 4 * a * (1 - a)])


def test_what_is_known_goes_on_after_a_resume() -> None:
    whole, first, second = (PromptWeights("divergence", floor=0.0, memory=0.5) for _ in range(3))
    steps = [(["a", "b"], [response([S], 0.1), response([S], 2.0)]), (["b", "a"], [response([S], 0.3)] * 2)]
    for prompts, traces in steps:
        expected = whole.weigh(prompts, traces, [math.nan] * 2)
    first.weigh(*steps[0], [math.nan] * 2)
    second.load_state_dict(first.state_dict())
    assert second.weigh(*steps[1], [math.nan] * 2) == expected
    assert second.state_dict() == whole.state_dict() and len(whole.state_dict()) == 2
    assert not any(word in str(whole.state_dict()) for word in ("'a'", "'b'")), "prompts themselves are not kept"


def test_none_weighs_nothing_and_knows_nothing() -> None:
    weights = PromptWeights("none", floor=0.1, memory=0.5)
    assert weights.weigh(["a"], [response([S])], [1.0]) == [1.0] and weights.state_dict() == {}


def test_a_response_without_a_token_or_a_proposal_is_unknown() -> None:
    weights = PromptWeights("acceptance", floor=0.0, memory=0.5)
    assert weights.weigh(["a", "b"], [figures_of(Trace.empty(1), 2), response([R])], [0.0, 0.0]) == [1.0, 1.0]


def test_weights_reach_every_token_of_their_response() -> None:
    """Beside the tokens' own weights; without any, nothing changes."""

    def weights_of(info: dict) -> list[float]:
        ids = torch.tensor([[9, 0, 1, 2], [9, 0, 1, 0]])
        mask = torch.tensor([[True, True, True], [True, True, False]])
        traces = [trace([S, S, S]), trace([S, S])]
        experience = SimpleNamespace(sequences=ids, action_mask=mask, info={TRACE_KEY: traces, **info})
        batches = OptimizerStepBatches(lambda own: own.response_ids + 1.0, "exclude", packed=False)
        batch = batches.batch_of(experience)
        assert not experience.info, "OpenRLHF would make metrics of it"
        return batch.token_weights_N.tolist()

    assert weights_of({}) == [1, 2, 3, 1, 2]
    assert weights_of({PROMPT_WEIGHT: [0.5, 2.0]}) == [0.5, 1, 1.5, 2, 4]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rollout": {"method": "on_policy"}, "loss": {"prompts": {"by": "acceptance"}}}, "needs a gate, and method"),
        ({"loss": {"prompts": {"by": "reward"}}}, "reward needs rewards"),
        ({"loss": {"prompts": {"floor": 0.3}}}, "floor = 0.3 has no effect: by is none"),
    ],
)
def test_what_would_do_nothing_is_refused(section: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_skd({"teacher": {"model_name_or_path": "t"}, **section})
