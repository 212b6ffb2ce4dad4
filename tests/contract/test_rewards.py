"""Rewards through the host's own executors: one that does not come is an error with its cause, never a silence."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.contract.test_openrlhf import _AlwaysTheSame, _Engine, _Tokenizer
from tests.waiting import GUARD_S


def execute(executor: Any, prompt: str = "ab") -> dict[str, Any]:
    from vllm import SamplingParams

    call = executor.execute(
        prompt=prompt, label="7", sampling_params=SamplingParams(max_tokens=8), max_length=64,
        hf_tokenizer=_Tokenizer(), llm_engine=_Engine("xyz"), images=None,
    )  # fmt: skip
    return asyncio.run(call)


def rewarded(endpoint: str | Path, timeout_s: float = 30.0) -> Any:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from skd_plugin.host.rewards import RewardedExecutor

    return RewardedExecutor(SingleTurnAgentExecutor([str(endpoint)]), timeout_s, str(endpoint))


@pytest.fixture
def reward_file(tmp_path: Path):
    def write(body: str) -> Path:
        path = tmp_path / "reward.py"
        path.write_text(f"import time\ndef reward_func(queries, prompts, labels):\n    {body}\n")
        return path

    return write


def test_fetchers_are_where_they_are_watched() -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from skd_plugin.host.rewards import FETCHERS

    assert all(hasattr(SingleTurnAgentExecutor, name) for name in FETCHERS), "revisit skd_plugin/host/rewards.py"


def test_a_reward_that_comes_is_handed_on(reward_file) -> None:
    response = execute(rewarded(reward_file("return {'rewards': float(labels[0]), 'scores': 1.0}")))
    assert (response["reward"], response["scores"]) == (7.0, 1.0)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("raise KeyError('no such label')", "KeyError: 'no such label'"),
        ("time.sleep(1)", r"took longer than skd\.objective\.reward_timeout_s = 0\.2"),
        ("return {}", "it returned none"),
    ],
)
def test_a_reward_that_does_not_come_is_an_error(reward_file, body: str, cause: str) -> None:
    from skd_plugin.host.rewards import RewardError

    with pytest.raises(RewardError, match=f"prompt 'ab' from .*reward.py: .*{cause}"):
        execute(rewarded(reward_file(body), timeout_s=0.2 if "sleep" in body else GUARD_S))


NUMBERS = ["True", "1", "1.0", "np.float32(1)", "np.int64(1)", "np.array([1.0])", "np.array(1)", "torch.tensor(1.0)",
           "torch.tensor([[1]])", "[1]", "(1.0,)", "[[True]]"]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS)
def test_one_number_is_a_reward_however_it_is_wrapped(reward_file, value: str) -> None:
    body = f"import numpy as np, torch; one = {value}; return dict(rewards=one, scores=one, extra_logs=dict(a=one))"
    response = execute(rewarded(reward_file(body)))
    for number in (response["reward"], response["scores"], response["extra_logs"]["a"]):
        assert type(number) is float and number == 1.0


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("float('nan')", "the reward is nan; it must be finite"),
        ("float('inf')", "the reward is inf; it must be finite"),
        ("'1'", r"the reward is '1' \(str\), but must be one number"),
        ("[1, 2]", r"the reward is '\[1, 2\]' \(list\)"),
        ("[]", r"the reward is '\[\]'"),
        ("np.zeros(2)", r"the reward is '\[0. 0.\]' \(ndarray\)"),
        ("[None]", r"the reward is '\[None\]'"),
        ("{}", r"the reward is '\{\}' \(dict\)"),
        ("1, scores='no'", "the score is 'no'"),
        ("1, extra_logs=dict(a=[1, 2])", r"'a' of extra_logs is '\[1, 2\]'"),
    ],
)
def test_what_is_no_number_is_an_error(reward_file, value: str, found: str) -> None:
    from skd_plugin.host.rewards import RewardError

    with pytest.raises(RewardError, match=f"^{found}.*, for the prompt 'ab', from .*reward.py$"):
        execute(rewarded(reward_file(f"import numpy as np; return dict(rewards={value})")))


@contextmanager
def server(answer: dict[str, Any] | None) -> Iterator[str]:
    """A reward server with this answer to everything; None: out of order."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if answer is None:
                self.send_error(500, "out of order")
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/score"
        found.shutdown()


def test_lists_of_a_reward_server() -> None:
    """The form in which OpenRLHF's own serve_rm answers."""
    with server({"rewards": [0.5], "scores": [0.5], "extra_logs": {"dummy_scores": [0.5]}}) as url:
        response = execute(rewarded(url))
    assert (response["reward"], response["scores"], response["extra_logs"]) == (0.5, 0.5, {"dummy_scores": 0.5})


def test_a_server_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import openrlhf.utils.agent as host

    from skd_plugin.host.rewards import RewardError

    monkeypatch.setattr(host, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": lambda _: asyncio.sleep(0)}))
    with server(None) as url, pytest.raises(RewardError, match="Request error for 5 times"):
        execute(rewarded(url))


def test_causes_belong_to_their_own_samples(reward_file) -> None:
    """Samples of one engine are scored at the same time; each error names its own prompt and cause."""
    executor = rewarded(reward_file("raise ValueError(prompts[0])"))

    async def both() -> list[Any]:
        from vllm import SamplingParams

        calls = [
            executor.execute(prompt=prompt, label="", sampling_params=SamplingParams(max_tokens=8), max_length=64,
                             hf_tokenizer=_Tokenizer(), llm_engine=_Engine("x"), images=None)
            for prompt in ("first", "second")
        ]  # fmt: skip
        return await asyncio.gather(*calls, return_exceptions=True)

    for prompt, error in zip(("first", "second"), asyncio.run(both()), strict=True):
        assert f"'{prompt}'" in str(error) and f"ValueError: {prompt}" in str(error)


def test_an_agent_without_a_reward_is_an_error() -> None:
    from openrlhf.utils.agent import AgentExecutorBase

    from skd_plugin.host.rewards import RewardedExecutor, RewardError

    class Silent(AgentExecutorBase):
        async def execute(self, prompt: str, **_: Any) -> dict[str, Any]:
            return {"reward": None}

    with pytest.raises(RewardError, match="no reward for the prompt 'ab'"):
        execute(RewardedExecutor(Silent(), 1.0, "an agent"))


# --- experience of rewarded responses (host/samples.py) ---


def make_maker(estimator: str = "reinforce", **objective: float) -> Any:
    from skd_plugin.config.objective import ObjectiveConfig
    from skd_plugin.host.samples import SKDExperienceMaker

    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=1.0, no_std_norm=True)
    args = SimpleNamespace(
        train=SimpleNamespace(dynamic_batch_enable=False),
        rollout=SimpleNamespace(micro_batch_size=2, n_samples_per_prompt=2),
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None),
        skd=SimpleNamespace(objective=ObjectiveConfig(rl_coef=1.0, **objective)),
    )
    strategy = SimpleNamespace(args=args)
    return SKDExperienceMaker(None, None, None, None, SimpleNamespace(value=0.1), strategy, _Tokenizer())


def rollout(maker: Any, responses: list[list[int]], sources: list[list[int]]) -> list[Any]:
    from skd_plugin.host.samples import SKDSamplesGenerator
    from tests.contract.test_openrlhf import make_response
    from tests.rules import make_rule

    strategy = SimpleNamespace(args=maker.args)
    generator = SKDSamplesGenerator(strategy, None, None, None, [], plan=_AlwaysTheSame(make_rule(top_k=1)), seed=0)
    samples = []
    for number, (response, source) in enumerate(zip(responses, sources, strict=True)):
        made = make_response([5, 6], response, float(number))
        drawn = made["skd"].drawn
        drawn.source[:] = torch.tensor(source, dtype=torch.uint8)
        drawn.teacher_logp[:], drawn.student_logp[:] = -1.0, -3.0
        samples.append(generator._process_response_into_experience(made, max_len=64))
    batches = maker.split_rollout_samples(samples)
    for batch in batches:
        batch.kl = torch.ones(batch.action_mask.shape)
    return batches


STUDENT, TEACHER = 0, 1
RESPONSES = [[8], [9, 10, 11], [12, 13], [14, 15, 16, 17]]
SOURCES = [[STUDENT], [STUDENT, TEACHER, STUDENT], [TEACHER, STUDENT], [STUDENT, STUDENT, STUDENT, TEACHER]]


def test_behaviour_is_that_of_the_model_which_wrote_the_token() -> None:
    batches = rollout(make_maker(), RESPONSES, SOURCES)
    for batch, rows in zip(batches, ((0, 1), (2, 3)), strict=True):
        for row, number in enumerate(rows):
            found = batch.rollout_log_probs[row][batch.action_mask[row].bool()]
            assert found.tolist() == [{STUDENT: -3.0, TEACHER: -1.0}[source] for source in SOURCES[number]]


def test_a_teachers_token_pays_no_penalty_for_leaving_the_reference() -> None:
    """The return of the first token is the reward minus the penalty (0.1 x 1 nat) of each of the student's tokens."""
    maker = make_maker("reinforce")
    maker.args.algo.advantage.no_std_norm = True
    batches = maker.compute_advantages_and_returns(rollout(maker, RESPONSES, SOURCES))
    for batch, rows in zip(batches, ((0, 1), (2, 3)), strict=True):
        for row, number in enumerate(rows):
            own = SOURCES[number].count(STUDENT)
            first = batch.returns[row][batch.action_mask[row].bool()][0].item()
            assert first == pytest.approx(number - 0.1 * own)


def test_the_teachers_view_is_added_behind_the_normalisation() -> None:
    """c (log p - log q) = 0.5 x 2 on every token, whatever the host made of the rewards."""
    plain, guided = make_maker("rloo"), make_maker("rloo", teacher_advantage=0.5)
    before = plain.compute_advantages_and_returns(rollout(plain, RESPONSES, SOURCES))
    after = guided.compute_advantages_and_returns(rollout(guided, RESPONSES, SOURCES))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other.advantages - one.advantages, one.action_mask.float())


def test_an_empty_response_has_advantages_without_nan() -> None:
    maker = make_maker("group_norm")
    batches = maker.compute_advantages_and_returns(rollout(maker, [[8], [], [9, 10], [11]], [[0], [], [0, 1], [0]]))
    for batch in batches:
        assert torch.isfinite(batch.advantages).all() and torch.isfinite(batch.returns).all()
    assert not batches[0].action_mask[1].any()


def test_a_failed_reward_would_be_logged_and_forgotten_by_the_host() -> None:
    """Why RewardedExecutor exists. If this fails, the host raises by itself now."""
    import inspect

    from openrlhf.utils.agent import SingleTurnAgentExecutor

    source = inspect.getsource(SingleTurnAgentExecutor.execute)
    assert "except Exception" in source and "logger.info" in source, "revisit skd_plugin/host/rewards.py"


# --- prompts (host/samples.py) ---


def test_a_prompt_that_the_host_would_cut_is_an_error() -> None:
    from skd_plugin.host.samples import SKDSamplesGenerator

    check = SKDSamplesGenerator._check_length
    generator = SimpleNamespace()
    check(generator, "x" * 24, 24, 32, 8)
    check(generator, "xx", 2, 32, 8)
    for prompt in ("x" * 25, "x"):
        with pytest.raises(ValueError, match=rf"a prompt has {len(prompt)} tokens, but 2 to 24 fit.*begins with 'x"):
            check(generator, prompt, len(prompt), 32, 8)


def test_a_task_scores_the_response_alone() -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from skd_plugin.host.rewards import RewardedExecutor, TaskRewards
    from skd_plugin.models import response_text
    from skd_plugin.tasks.label import Label

    def scored(text: str, label: str) -> Any:
        text_of = partial(response_text, _Tokenizer(), end_ids={ord("\n")})
        executor = RewardedExecutor(TaskRewards(SingleTurnAgentExecutor(None), text_of, GUARD_S), GUARD_S, "a task")
        return asyncio.run(
            executor.execute(
                prompt="the answer is 1",
                label=label,
                sampling_params=SamplingParams(max_tokens=8),
                max_length=64,
                hf_tokenizer=_Tokenizer(),
                llm_engine=_Engine(text),
                images=None,
            )
        )

    from vllm import SamplingParams

    label = Label(" the answer is 73", "arithmetic", "73", "\n").to_json()
    right, wrong = scored(" the answer is 73\n", label), scored("7\n", label)
    assert (right["reward"], right["scores"], wrong["reward"]) == (1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="their label is 'mine'"):
        scored("7", "mine")
