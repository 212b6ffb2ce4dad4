"""The client of a teacher elsewhere: which server is asked, how often, how many at once, and what a probe finds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.errors import RecipeError
from skd_plugin.served import replicas
from skd_plugin.served.probe import probe, probe_text
from skd_plugin.served.replicas import ServerError
from skd_plugin.served.teacher import ServedTeacher, Server
from tests.teacher_server import LOGP, NAME, TeacherServer, serving

KEY = "sk-do-not-write-me-down"
VOCAB = 5


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(replicas, "LONGEST_WAIT_S", 0.05)


@pytest.fixture
def teacher() -> Iterator[TeacherServer]:
    with serving(TeacherServer()) as found:
        yield found


def server(*teachers: TeacherServer, **others: Any) -> Server:
    given = {"model": NAME, "key_env": None, "timeout_s": 20.0, "patience_s": 20.0, "in_flight": 8, "top_k": 3}
    return Server(tuple(one.url for one in teachers), **given | others)


def read(asked: Server, *texts: list[int]) -> list[Any]:
    """Readings of responses to a prompt of two tokens, asked for at once."""

    async def together() -> list[Any]:
        async with ServedTeacher(asked, VOCAB) as teacher:
            return await asyncio.gather(*(teacher.read([0, 1], text) for text in texts))

    return asyncio.run(together())


def test_a_text_is_read(teacher: TeacherServer) -> None:
    (reading,) = read(server(teacher), [4, 0])
    assert reading.token_logp_R.tolist() == [LOGP[4], LOGP[0]]
    assert reading.rank_R.tolist() == [4, 0]
    assert reading.topk_ids_RK.tolist() == [[0, 1, 2]] * 2
    assert reading.topk_logp_RK.tolist() == [LOGP[:3]] * 2
    assert teacher.asked == [{"model": NAME, "prompt": [0, 1, 4, 0], "max_tokens": 1, "prompt_logprobs": 3}]


def test_nobody_is_asked_about_nothing(teacher: TeacherServer) -> None:
    (reading,) = read(server(teacher), [])
    assert len(reading.token_logp_R) == 0
    assert not teacher.asked


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_pass_is_asked_again(teacher: TeacherServer, status: int) -> None:
    replies = [(status, "loading"), (status, "loading")]
    teacher.before = lambda body: replies.pop() if replies else None
    (reading,) = read(server(teacher), [1])
    assert reading.rank_R.tolist() == [1]
    assert len(teacher.asked) == 3


def test_what_will_not_pass_is_not_asked_again(teacher: TeacherServer) -> None:
    teacher.before = lambda body: (400, {"error": "the prompt is too long"})
    with pytest.raises(ServerError, match=r"400 Bad Request: .*too long"):
        read(server(teacher), [1])
    assert len(teacher.asked) == 1


def test_patience_has_an_end(teacher: TeacherServer) -> None:
    teacher.before = lambda body: (503, "still loading")
    with pytest.raises(ServerError, match=r"for 2 s .*patience_s.*503 .*goes on from its last"):
        read(server(teacher, patience_s=2.0), [1])
    assert len(teacher.asked) > 1


def test_a_server_that_comes_back_is_asked_again(teacher: TeacherServer) -> None:
    """Nobody listens at first."""
    gone = TeacherServer()
    with serving(gone):
        pass
    port = int(gone.url.rsplit(":", 1)[1])

    async def ask() -> Any:
        async with ServedTeacher(server(gone), VOCAB) as client:
            task = asyncio.create_task(client.read([0, 1], [2, 3]))
            while client.replicas.members[0].failed_at < 0:
                await asyncio.sleep(0.01)
            with serving(gone, port):
                return await task

    assert asyncio.run(ask()).rank_R.tolist() == [2, 3]
    assert len(gone.asked) == 1


def test_a_connection_that_breaks_off_is_no_answer(teacher: TeacherServer) -> None:
    """As of a server that is killed while it reads."""
    breaks = [True]

    def hang_up(body: dict[str, Any]) -> None:
        if breaks and breaks.pop():
            raise BrokenPipeError

    teacher.before = hang_up
    (reading,) = read(server(teacher), [1])
    assert reading.rank_R.tolist() == [1]
    assert len(teacher.asked) == 2


def test_an_answer_that_is_no_json(teacher: TeacherServer) -> None:
    teacher.before = lambda body: (200, b"")
    with pytest.raises(ServerError, match="no JSON"):
        read(server(teacher), [1])


def test_a_server_that_does_not_answer_is_left_for_another(teacher: TeacherServer) -> None:
    let_go = threading.Event()
    with serving(TeacherServer(before=lambda body: (503, "late") if let_go.wait(20) else None)) as silent:
        try:
            readings = read(server(silent, teacher, timeout_s=0.3), *([n % 5] for n in range(6)))
        finally:
            let_go.set()
    assert [reading.rank_R.item() for reading in readings] == [n % 5 for n in range(6)]
    assert len(silent.asked) + len(teacher.asked) >= 6 > len(silent.asked)


def test_the_server_with_the_fewest_under_way_is_asked() -> None:
    """Two that answer when each has half of the requests: else neither ever does."""
    together = threading.Barrier(8)

    def wait(body: dict[str, Any]) -> None:
        together.wait(20)

    with serving(TeacherServer(before=wait)) as one, serving(TeacherServer(before=wait)) as other:
        read(server(one, other), *([n % 5] for n in range(8)))
    assert len(one.asked) == len(other.asked) == 4


def test_no_more_are_under_way_than_allowed(teacher: TeacherServer) -> None:
    readings = read(server(teacher, in_flight=2), *([n % 5] for n in range(12)))
    assert [reading.rank_R.item() for reading in readings] == [n % 5 for n in range(12)]
    assert teacher.most_under_way <= 2


def test_a_request_that_is_given_up_leaves_its_place(teacher: TeacherServer) -> None:
    let_go = threading.Event()
    waits = [True]
    teacher.before = lambda body: (200, {}) if waits and waits.pop() and let_go.wait(20) else None

    async def ask() -> Any:
        async with ServedTeacher(server(teacher, in_flight=1), VOCAB) as client:
            first = asyncio.create_task(client.read([0], [1]))
            while not teacher.asked:
                await asyncio.sleep(0.01)
            first.cancel()
            return await client.read([0], [2])

    try:
        assert asyncio.run(ask()).rank_R.tolist() == [2]
    finally:
        let_go.set()


def test_the_key_is_sent_and_never_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving(TeacherServer(key=KEY)) as teacher:
        asked = server(teacher, key_env="TEACHER_KEY")
        assert probe(asked, Letters(), VOCAB, 60)
        assert read(asked, [1])
        teacher.before = lambda body: (400, "no")
        with pytest.raises(ServerError) as refused:
            read(asked, [1])
        monkeypatch.setenv("TEACHER_KEY", "sk-another")
        with pytest.raises(RecipeError, match=r"401 .*wants a key; .* is of TEACHER_KEY") as wrong:
            probe(asked, Letters(), VOCAB, 60)
    said = f"{refused.value}{wrong.value}{asked!r}{ServedTeacher(asked, VOCAB).replicas!r}{capfd.readouterr()}"
    assert KEY not in said and "sk-another" not in said


def test_a_key_that_the_environment_has_not(teacher: TeacherServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(RecipeError, match="TEACHER_KEY, which is not set in this process"):
        probe(server(teacher, key_env="TEACHER_KEY"), Letters(), VOCAB, 60)


def test_the_teacher_writes(teacher: TeacherServer) -> None:
    settings = SamplingSettings(top_k=0, teacher_temperature=0.0)

    async def write() -> list[int]:
        async with ServedTeacher(server(teacher), VOCAB) as client:
            return await client.write([0, 1], settings, limit=7, seed=-3, end_ids=[2])

    assert asyncio.run(write()) == [3, 2]
    (body,) = teacher.asked
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["stop_token_ids"]) == ([0, 1], 7, 0.0, [2])
    assert body["seed"] >= 0


class Letters:
    """The tokenizer of `TeacherServer.tokenize`."""

    shift = 0

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": [(ord(letter) + self.shift) % 5 for letter in text]})

    def decode(self, ids: list[int]) -> str:
        return "abcde"[ids[0]]


class OtherLetters(Letters):
    shift = 1


def test_a_probe_of_a_good_server(teacher: TeacherServer) -> None:
    assert probe(server(teacher), Letters(), VOCAB, 60) == [f"{NAME} at {teacher.url}, texts of up to 64 tokens"]
    (body,) = teacher.asked
    text, ids = probe_text(Letters(), VOCAB, 60)
    assert body["prompt"] == text and len(ids) <= 60


def test_each_server_is_probed(teacher: TeacherServer) -> None:
    with (
        serving(TeacherServer(max_model_len=8)) as short,
        pytest.raises(RecipeError, match=f"{short.url} takes 8 tokens, but the longest text has 60.*len 61 or more"),
    ):
        probe(server(teacher, short), Letters(), VOCAB, 60)


def test_a_probe_where_nobody_listens() -> None:
    gone = TeacherServer()
    with serving(gone):
        pass
    with pytest.raises(RecipeError, match=rf"no server answers at {gone.url} .*vllm serve {NAME} --max-logprobs 3"):
        probe(server(gone), Letters(), VOCAB, 60)


def no_log_probs(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"choices": [{"prompt_logprobs": None}]}


def logits(body: dict[str, Any]) -> tuple[int, Any]:
    entries = {str(token): {"logprob": 5.0 - token, "rank": token + 1} for token in range(5)}
    ids = TeacherServer().tokenize(body["prompt"])
    return 200, {"choices": [{"prompt_logprobs": [None, *[entries] * (len(ids) - 1)]}]}


@pytest.mark.parametrize(
    ("tokenizer", "options", "before", "message"),
    [
        (
            Letters,
            {"model": "another"},
            None,
            f"has no model 'another'; it has '{NAME}': set skd",
        ),
        (Letters, {"top_k": 5}, None, r"400 .*asked for the 5 most .*--max-logprobs 5, or ask for fewer"),
        (OtherLetters, {}, None, "are not those of skd.teacher.model_name_or_path.*from token 0 on they differ"),
        (Letters, {}, no_log_probs, "no prompt_logprobs"),
        (Letters, {}, logits, "these are no log-probabilities: .*logprobs-mode"),
        (Letters, {}, lambda body: (404, "Not Found"), "404 .*Is it a server of vLLM"),
        (Letters, {}, lambda body: (200, b"<html>"), "something else than JSON: '<html>'"),
    ],
)
def test_what_a_probe_finds(teacher: TeacherServer, tokenizer: Any, options: Any, before: Any, message: str) -> None:
    teacher.before = before or teacher.before
    with pytest.raises(RecipeError, match=message):
        probe(server(teacher, **options), tokenizer(), VOCAB, 60)


def test_a_server_that_does_not_say_how_long(teacher: TeacherServer) -> None:
    teacher.max_model_len = None
    assert probe(server(teacher), Letters(), VOCAB, 60) == [f"{NAME} at {teacher.url}"]


def test_no_redirect_takes_the_key_elsewhere() -> None:
    assert httpx.AsyncClient().follow_redirects is False


def test_a_reading_is_of_the_vocabulary_of_both(teacher: TeacherServer) -> None:
    async def ask() -> torch.Tensor:
        async with ServedTeacher(server(teacher), vocab_size=2) as client:
            return (await client.read([0], [1])).topk_ids_RK

    assert asyncio.run(ask()).tolist() == [[0, 1, -1]]
