"""The rule and the seed of a step travel with its prompts, through OpenRLHF's own generator to its engines."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from skd_plugin.core.rng import derive_seed
from skd_plugin.engine.sampling_rule import SamplingRule
from skd_plugin.host.asked import AskedPrompt, AskedSample, SampledBy
from tests.contract.test_openrlhf import make_response
from tests.rules import make_rule

SEED, SAMPLES = 7, 2
RULES = [make_rule(top_k=step + 1) for step in range(3)]
GREEDY = RULES[0].student_only(0.0)


class Engine:
    """Keeps what it is asked. It has no other method: nothing can be told to it beside its prompts."""

    def __init__(self) -> None:
        self.asked: list[AskedPrompt] = []
        self.messages = 0
        self.answered: list[int] = []  # prompts in each message of responses
        self._calls: dict[str, Iterator[dict[str, Any]]] = {}
        self.get_num_unfinished_requests = SimpleNamespace(remote=lambda: 0)
        self.ask = SimpleNamespace(remote=self._ask)
        self.responses = SimpleNamespace(remote=self._responses)

    def _ask(self, key: str, calls: list[dict[str, Any]]) -> None:
        self.messages += 1
        self._calls[key] = iter(calls)

    def _responses(self, key: str, number: int) -> Any:
        self.answered.append(number)
        return [response for call in islice(self._calls[key], number) for response in self._generate(**call)]

    def _generate(self, *, prompt: AskedPrompt, num_samples: int, **_: Any) -> Any:
        self.asked.append(pickle.loads(pickle.dumps(prompt)))
        assert isinstance(prompt, AskedPrompt), "what the generator is given as a prompt is not what it sends"
        return [make_response([5, 6], [7]) | {"prompt": prompt.prompt} for _ in range(num_samples)]


class Plan:
    def at(self, step: int) -> SamplingRule:
        return RULES[step]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def generator(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With prompts "aa", "ab", "ac", "ac", "ad", ... two a step, and the first three of them held out."""
    from openrlhf.trainer.ppo_utils import samples_generator as host

    from skd_plugin.config.teacher import ONLY
    from skd_plugin.host.samples import SKDSamplesGenerator, _Teacher

    def batches(prompts: list[str]) -> list[Any]:
        return [(["source"], [prompt], [""], [None]) for prompt in prompts]

    monkeypatch.setattr(host.ray, "get", lambda refs: refs)  # the module ray, ours and the host's
    monkeypatch.setattr(host.ray, "put", lambda value: value)
    monkeypatch.setattr(host.ray, "wait", lambda refs, **_: (refs[-1:], refs[:-1]))  # the last one first
    args = SimpleNamespace(
        rollout=SimpleNamespace(batch_size=2, n_samples_per_prompt=SAMPLES, vllm_generate_batch_size=None),
        algo=SimpleNamespace(dynamic_filtering_enable=False, advantage=SimpleNamespace(is_correction_level="off")),
        vllm=SimpleNamespace(enable_sleep=False),
    )
    training = batches(["aa", "ab", "ac", "ac", "aa", "ad"])
    generator = SKDSamplesGenerator(
        SimpleNamespace(args=args),
        training,
        batches(["aa", "ab", "ac"]),
        lambda texts, **_: SimpleNamespace(input_ids=[[ord(char) for char in text] for text in texts]),
        [engine],
        plan=Plan(),
        seed=SEED,
    )
    generator._teachers = {ONLY: _Teacher(None, frozenset(), [engine])}
    return generator


def test_each_prompt_has_the_rule_and_the_seed_of_its_step_or_evaluation(generator: Any, engine: Engine) -> None:
    lengths = {"max_len": 16, "max_new_tokens": 4}
    generator.generate_samples(**lengths)
    generator.step += 1
    generator.generate_eval_samples(rule=GREEDY, n_samples_per_prompt=1, **lengths)
    generator.generate_samples(**lengths)
    generator.step += 1
    samples, *_ = generator.generate_samples(**lengths)
    of_step = [SampledBy(rule, derive_seed(SEED, step)) for step, rule in enumerate(RULES)]
    held_out = SampledBy(GREEDY, derive_seed(SEED, -1))
    assert engine.asked == [
        AskedPrompt("aa", of_step[0]),
        AskedPrompt("ab", of_step[0]),
        *(AskedPrompt(prompt, held_out) for prompt in ("aa", "ab", "ac")),
        AskedPrompt("ac", of_step[1]),
        AskedPrompt("ac", of_step[1], before=1),
        AskedPrompt("aa", of_step[2]),
        AskedPrompt("ad", of_step[2]),
    ], "revisit skd_plugin/host/asked.py"
    assert sorted(sample.prompts[0] for sample in samples) == ["aa", "aa", "ad", "ad"]
    assert engine.messages == 4, "prompts did not go in one message"


@pytest.mark.parametrize("filtered", [False, True])
def test_responses_come_in_few_messages_but_one_by_one_where_each_is_filtered(
    generator: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, filtered: bool
) -> None:
    """OpenRLHF means the scores of what comes in a message, to keep or drop all of it."""
    from skd_plugin.host import samples as ours

    monkeypatch.setattr(ours, "AT_ONCE", 2)
    generator.args.rollout.batch_size = 5
    generator.args.algo.dynamic_filtering_enable = filtered
    generator.args.algo.dynamic_filtering_range = (0.0, 1.0)
    samples, *_ = generator.generate_samples(max_len=16, max_new_tokens=4)
    assert engine.answered == ([1] * 5 if filtered else [2, 3])
    assert len(samples) == 5 * SAMPLES


def test_the_bar_over_responses_is_not_drawn_for_each_of_them() -> None:
    from skd_plugin.host.samples import CalmBar

    drawn = io.StringIO()
    bar = CalmBar(range(200), desc="Generate samples", file=drawn, mininterval=3600)  # as OpenRLHF makes and moves it
    for number in range(200):
        bar.set_postfix({"prompts_consumed": number})
        bar.update()
    bar.close()
    first, last = (line for line in drawn.getvalue().split("\r") if line.strip())
    assert "0 messages" in first and "200 messages" in last and "prompts_consumed=199" in last


def test_responses_to_a_prompt_that_is_sent_twice_are_numbered_through() -> None:
    by = SampledBy(RULES[0], SEED)
    numbers = [sample for before in (0, 1) for sample in AskedPrompt("aa", by, before).samples(SAMPLES)]
    assert numbers == [AskedSample("aa", by, number) for number in (1, 2, 3, 4)]
