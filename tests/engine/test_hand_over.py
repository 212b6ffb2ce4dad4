"""The law of a text in which the teacher writes legs, in the real engine; the state is told anew from its own ids."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.core.trace import Source
from tests.conftest import VOCAB
from tests.engine.test_distribution import assert_distribution, generate_mixed
from tests.engine.test_gates import entropy, expected
from tests.rules import make_rule

pytestmark = pytest.mark.engine

LENGTH = 7
MODELS = "teacher", "student"
RULES = {
    "two legs of 3": make_rule(top_k=3, hand_over_len=3, hand_overs=2, teacher_temperature=0.8),
    "one leg": make_rule(top_k=0, gate="floor", threshold=0.03, hand_over_len=4, hand_overs=1),
    "until it is sure": make_rule(top_k=3, hand_over_len=6, hand_over_until=2.3, student_temperature=1.3),
    "of a mixture": make_rule(top_k=0, gate="interpolated", threshold=0.5, hand_over_len=2, teacher_top_p=0.9),
}


def law(
    settings: SamplingSettings, sources: list[int], teacher_TV: torch.Tensor, student_TV: torch.Tensor
) -> torch.Tensor:
    """Of (provenance, token) behind tokens of these sources [6V or more]; rows of logits are of the response."""
    place, legs = len(sources), sources.count(Source.REPLACED)
    age = next((back for back, source in enumerate(reversed(sources)) if source != Source.HANDED), place)
    began = place - age and sources[place - age - 1] == Source.REPLACED
    calm = entropy(teacher_TV[place].double().softmax(-1)) <= settings.hand_over_until
    plain = replace(settings, hand_over_len=0)
    if began and age < settings.hand_over_len - 1 and not calm:
        joint = expected(replace(plain, gate="chance", threshold=1.0), teacher_TV[place], student_TV[place], place)
        return joint.view(-1, VOCAB)[[0, 0, 0, 0, 0, 0, Source.REPLACED]].flatten()
    if legs >= settings.hand_overs:
        plain = replace(plain, gate="chance", threshold=0.0)
    return expected(plain, teacher_TV[place], student_TV[place], place)


@pytest.fixture(scope="module")
def samples(engine) -> dict[str, list]:
    return dict(zip(RULES, generate_mixed(engine(4), list(RULES.values()), LENGTH, seed=5), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_every_token_has_the_law_of_its_state(samples, reference_logits, name):
    settings = RULES[name].settings
    sequences = [[*s.prompt_ids, *s.trace.response_ids.tolist()] for s in samples[name]]
    distinct = [list(x) for x in dict.fromkeys(map(tuple, sequences))]
    rows = {model: dict(zip(map(tuple, distinct), reference_logits(model, distinct), strict=True)) for model in MODELS}
    for place in (0, 1, 2, 3, 5):
        outcomes, laws = [], []
        for sample, ids in zip(samples[name], map(tuple, sequences), strict=True):
            sources = sample.trace.source.tolist()
            if len(sources) <= place:
                continue
            logits = [rows[model][ids][len(sample.prompt_ids) - 1 :] for model in MODELS]
            laws.append(law(settings, sources[:place], *logits))
            outcomes.append(int(sample.trace.response_ids[place]) + VOCAB * sources[place])
        assert len(outcomes) > 400
        assert_distribution(outcomes, torch.stack(laws))


def test_states_of_every_kind_occur(samples):
    """Else the law above would be that of a gate alone."""
    for name, responses in samples.items():
        sources = [s.trace.source.tolist() for s in responses]
        flat = [source for own in sources for source in own]
        assert min(flat.count(code) for code in (Source.ACCEPTED, Source.REPLACED, Source.HANDED)) > 100, name
    one = [s.trace.source.tolist() for s in samples["one leg"]]
    assert max(own.count(Source.REPLACED) for own in one) == 1
    legs = [s.trace.source.tolist() for s in samples["until it is sure"]]
    cut = sum(a == Source.HANDED and b == Source.ACCEPTED for own in legs for a, b in pairwise(own))
    assert cut > 50, "legs that end before their length"


def test_legs_do_not_depend_on_blocks(engine):
    rules = [rule for rule in RULES.values() for _ in range(12)]
    prompts, seeds = [[1, 5, 3 + i % 29] for i in range(len(rules))], list(range(len(rules)))
    short, long = (engine(draft_len).generate(prompts, rules, 24, seeds=seeds) for draft_len in (1, 4))
    for one, other in zip(short, long, strict=True):
        assert one.trace.response_ids.tolist() == other.trace.response_ids.tolist()
        assert one.trace.source.tolist() == other.trace.source.tolist()
