"""The student alone in an engine, and its texts read by a real server of vLLM: the traces of an engine with both."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from skd_plugin.core.sampling import KEEP_ALL
from skd_plugin.core.trace import Source
from skd_plugin.engine.offline import StudentEngine
from skd_plugin.engine.request import Sample
from skd_plugin.errors import RecipeError
from skd_plugin.models import load_tokenizer
from skd_plugin.served.probe import probe
from skd_plugin.served.teacher import ServedTeacher, Server
from tests.conftest import MAX_LEN, VOCAB
from tests.rules import make_rule
from tests.specs import make_spec
from tests.waiting import GUARD_S, wait_for

pytestmark = pytest.mark.engine

TOP_K = 10  # of the server; as many as are compared with each other at the top
KEPT = 8  # of the engine with both
NAME = "tiny-teacher"
LIMIT = 40
# None for the student's free choice, a reference, greedy, a nucleus.
RULES = [
    make_rule(top_k=KEEP_ALL),
    make_rule(top_k=KEEP_ALL, reference_share=1.0),
    make_rule(top_k=KEEP_ALL, student_temperature=0.0),
    make_rule(top_k=KEEP_ALL, student_temperature=0.7, student_top_p=0.9),
]


class Process:
    """`vllm serve` on the tiny teacher; it keeps its port when it is started again."""

    def __init__(self, model: Path, log: Path) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model, self._log = model, log
        self.start()

    def start(self) -> None:
        command = [
            *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
            *(
                "--model",
                str(self._model),
                "--served-model-name",
                NAME,
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ),
            *("--max-model-len", str(MAX_LEN + 1), "--max-logprobs", str(TOP_K), "--max-num-seqs", "32"),
            *("--dtype", "float32", "--enforce-eager"),
            *("--gpu-memory-utilization", "0.05" if torch.cuda.is_available() else "0.1"),
        ]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        def answers() -> bool:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                return httpx.get(f"{self.url}/v1/models").is_success
            except httpx.TransportError:
                return False

        wait_for(answers, "the server")

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def process(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Started in this line, and waited for by whoever asks it first: meanwhile the engines start."""
    found = Process(tiny_pair / "teacher", tmp_path_factory.mktemp("server") / "log")
    yield found
    found.kill()


@pytest.fixture(scope="module")
def server(process: Process) -> Server:
    return Server((process.url,), NAME, key_env=None, timeout_s=60.0, patience_s=600.0, in_flight=8, top_k=TOP_K)


@pytest.fixture(scope="module")
def student(process: Process, server: Server, tiny_pair: Path) -> StudentEngine:
    """With so little room that prompts are read in pieces and requests are preempted."""
    spec = make_spec(
        teacher=str(tiny_pair / "teacher"),
        student=str(tiny_pair / "student"),
        draft_len=0,
        max_len=MAX_LEN,
        alone_len=MAX_LEN,
        teacher_top_k=TOP_K,
        options=dict(max_num_seqs=16, max_num_batched_tokens=48, kv_cache_memory_bytes=24 * 32 * 256, block_size=32),
    )
    return StudentEngine(spec, server)


def questions(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 50, (number,), generator=generator).tolist()
    return {
        "prompts": [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths],
        "rule": [RULES[index % len(RULES)] for index in range(number)],
        "max_new_tokens": LIMIT,
        "seed": 5,
        "texts": ["abc = de"] * number,
    }


@pytest.fixture(scope="module")
def samples(process: Process, engine, student: StudentEngine) -> tuple[list[Sample], list[Sample]]:
    """Of the same questions: by the engine with both, and by the student whose teacher is elsewhere."""
    asked = questions(24)
    together = engine(2).generate(**asked)
    process.wait()
    return together, student.generate(**asked)


def test_the_same_texts(samples: tuple[list[Sample], list[Sample]]) -> None:
    for one, other in zip(*samples, strict=True):
        assert one.trace.response_ids.tolist() == other.trace.response_ids.tolist()
        assert (one.text, one.finish) == (other.text, other.finish)
    sources = {source for _, own in [samples] for sample in own for source in sample.trace.source.tolist()}
    assert sources == {Source.ACCEPTED, Source.REFERENCE}


@pytest.mark.parametrize("name", ["source", "rejected_ids", "draft_rank", "student_version"])
def test_the_same_record(samples: tuple[list[Sample], list[Sample]], name: str) -> None:
    for one, other in zip(*samples, strict=True):
        assert getattr(one.trace, name).tolist() == getattr(other.trace, name).tolist()


@pytest.mark.parametrize(
    "name", ["student_logp", "teacher_logp", "student_entropy", "top_overlap", "same_first", "teacher_topk_logp"]
)
def test_the_same_figures(samples: tuple[list[Sample], list[Sample]], name: str) -> None:
    for one, other in zip(*samples, strict=True):
        mine, theirs = getattr(other.trace, name), getattr(one.trace, name)
        if mine.dim() == 2:
            mine, theirs = mine[:, :KEPT], theirs[:, :KEPT]
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_what_is_left_for_all_other_tokens(samples: tuple[list[Sample], list[Sample]], reference_logits) -> None:
    """Beside the K and the text's own, from the whole distribution in float64."""
    for sample in samples[1]:
        trace, ids = sample.trace, sample.trace.response_ids.long()
        (logits,) = reference_logits("teacher", [sample.prompt_ids + ids.tolist()])
        p_RV = logits[len(sample.prompt_ids) - 1 : -1].softmax(-1)
        p_RV.scatter_(1, trace.teacher_topk_ids.long(), 0.0).scatter_(1, ids[:, None], 0.0)
        torch.testing.assert_close(trace.teacher_rest_tempered.double().exp(), p_RV.sum(1), atol=1e-5, rtol=0)
        assert trace.kl.isnan().all() and trace.teacher_entropy.isnan().all()


def test_the_teacher_reads_its_own_prompt(student: StudentEngine, reference_logits, samples: Any) -> None:
    own = [[5, 6, 7, 8, 9, 3, 4], [4, 3]]
    found = student.generate([[3, 4], [9, 8, 7, 6, 5]], RULES[0], 12, seed=1, teacher_prompts=own)
    for sample, prompt in zip(found, own, strict=True):
        assert sample.teacher_ids == prompt
        ids = sample.trace.response_ids.long()
        (logits,) = reference_logits("teacher", [prompt + ids.tolist()])
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        torch.testing.assert_close(sample.trace.teacher_logp.double(), logp, atol=1e-4, rtol=0)


def test_new_weights(student: StudentEngine, hf_models: dict, samples: Any) -> None:
    """What the trainer sends is what samples from then on; and back."""
    weights = hf_models["student"].state_dict()
    asked = {key: value[:1] if isinstance(value, list) else value for key, value in questions(24).items()}
    student.load_student([("lm_head.weight", -weights["lm_head.weight"])])
    (changed,) = student.generate(**asked)
    student.load_student([("lm_head.weight", weights["lm_head.weight"])])
    (same,) = student.generate(**asked)
    assert same.trace.response_ids.tolist() == samples[1][0].trace.response_ids.tolist()
    assert changed.trace.response_ids.tolist() != same.trace.response_ids.tolist()


def test_probe(process: Process, server: Server, tiny_pair: Path, samples: Any) -> None:
    """A real server is found good, and each thing that it is not is said."""
    tokenizer = load_tokenizer(str(tiny_pair / "teacher"), "teacher")
    assert probe(server, tokenizer, VOCAB, MAX_LEN) == [
        f"{NAME} at {process.url}, texts of up to {MAX_LEN + 1} tokens"
    ]
    for wrong, longest, message in (
        ({"top_k": TOP_K + 1}, MAX_LEN, f"start it with --max-logprobs {TOP_K + 1}"),
        ({"model": "another"}, MAX_LEN, f"has no model 'another'; it has '{NAME}'"),
        ({}, MAX_LEN + 1, f"--max-model-len {MAX_LEN + 2} or more"),
    ):
        with pytest.raises(RecipeError, match=message):
            probe(replace(server, **wrong), tokenizer, VOCAB, longest)
    tokenizer.add_tokens(["text"])
    with pytest.raises(RecipeError, match=r"are not those of skd\.teacher\.model_name_or_path"):
        probe(server, tokenizer, VOCAB, MAX_LEN)


def test_a_teacher_that_writes(server: Server, hf_models: dict, samples: Any) -> None:
    async def write() -> list[int]:
        async with ServedTeacher(server, VOCAB) as teacher:
            return await teacher.write([3, 4, 5], make_rule(top_k=0, teacher_temperature=0.0).settings, 6, 1, [2])

    ids = asyncio.run(write())
    expected = hf_models["teacher"].generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False)[0, 3:]
    assert ids == expected.tolist()


def test_killed_while_it_reads_and_started_again(
    process: Process, student: StudentEngine, samples: tuple[list[Sample], list[Sample]]
) -> None:
    """kill -9 once the first texts have been read; nothing is lost, nothing doubled, and nothing is another."""
    asked = questions(24)
    read = ServedTeacher.read
    has_read = threading.Event()

    async def noted(self: ServedTeacher, *args: Any) -> Any:
        reading = await read(self, *args)
        has_read.set()
        return reading

    def kill() -> None:
        assert has_read.wait(GUARD_S)
        process.kill()
        process.start()

    # The engine stays in the thread that it was made in: vLLM's attention on a CPU counts OpenMP's threads by thread.
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(ServedTeacher, "read", noted)
        killed = pool.submit(kill)
        found = student.generate(**asked)
        killed.result()
    for before, after in zip(samples[1], found, strict=True):
        assert after.trace.response_ids.tolist() == before.trace.response_ids.tolist()
        torch.testing.assert_close(after.trace.teacher_topk_logp, before.trace.teacher_topk_logp, atol=1e-5, rtol=0)
