"""What of a recipe goes with a teacher that is elsewhere."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from skd_plugin.config.schema import SKDConfig, parse_skd
from skd_plugin.core.methods import METHODS
from skd_plugin.engine.arguments import SCHEDULER_CLS, STUDENT_WORKER_CLS
from skd_plugin.errors import RecipeError
from skd_plugin.models import load_tokenizer
from skd_plugin.prepare.servers import refuse_joined_ends
from skd_plugin.served.teacher import Server
from tests.specs import make_spec

URL = "http://10.0.0.7:8000"


def served(teacher: dict[str, Any] | None = None, **sections: Any) -> SKDConfig:
    teacher = {"model_name_or_path": "org/teacher", "url": URL} | (teacher or {})
    return parse_skd({"teacher": teacher, "rollout": {"method": "on_policy"}, **sections})


def test_one_server_or_several() -> None:
    assert served().the_teacher.urls == (URL,)
    assert served({"url": ["http://a:1/v1/", "https://b/teacher"]}).the_teacher.urls == (
        "http://a:1",
        "https://b/teacher",
    )
    assert parse_skd({"teacher": {"model_name_or_path": "t"}}).the_teacher.urls == ()


def test_the_recipe_survives_its_own_file() -> None:
    config = served({"url": [URL], "server": {"key_env": "KEY"}})
    assert SKDConfig(**config.model_dump()) == config


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.source == "student"])
def test_texts_that_are_finished_are_read(method: str) -> None:
    assert served(rollout={"method": method}).draft_len == 0


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (
            "skd",
            "a gate asks the teacher before every token.*Use on_policy, supervised, mixed, two_stage, or",
        ),
        ("mixed_skd", "a gate asks the teacher before every token"),
        ("teacher", "asked to read finished texts, and not to write them"),
        ("seq_kd", "asked to read finished texts, and not to write them"),
    ],
)
def test_methods_in_the_engine_alone(method: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"rollout.method is '{method}', but the teacher is elsewhere.*{reason}"):
        served(rollout={"method": method})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"follow": {"ema": 0.9}}}, "teacher.follow moves the engine's own teacher"),
        ({"loss": {"vocabulary": "full"}}, "full needs the teacher's hidden states"),
        ({"loss": {"temperature": 2.0}}, "loss.temperature is 2, .*not the whole distribution; use 1"),
        ({"loss": {"student_top_k": 4}}, "loss.student_top_k asks"),
        ({"loss": {"reweight": {"by": "confidence"}}}, "loss.reweight.by: confidence cannot be computed"),
        ({"loss": {"reweight": {"by": "divergence"}}}, "loss.reweight.by: divergence cannot be computed"),
        ({"loss": {"prompts": {"by": "divergence"}}}, "loss.prompts.by: divergence cannot be computed"),
        (
            {"loss": {"regions": [{"where": "flat", "kind": "jsd", "threshold": 1}]}},
            "loss.regions: flat cannot be computed",
        ),
        ({"vllm": {"quantization": "fp8"}}, "vllm.quantization would round the student"),
    ],
)
def test_what_takes_the_teacher_in_the_engine(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        served(**sections)


def test_what_a_server_does_know() -> None:
    loss = {"reweight": {"by": "rank"}, "regions": [{"where": "distrusted", "kind": "forward_kl", "threshold": 0.1}]}
    assert served(loss=loss).loss.reweight.by == "rank"


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"url": "10.0.0.7:8000"}, "no address; write it as http://HOST:PORT"),
        ({"url": "http://user:sk-secret@host"}, "give the key in an environment variable"),
        ({"url": "http://host?key=sk-secret"}, "give the key in an environment variable"),
        ({"url": []}, "an empty list"),
        ({"url": None, "server": {"in_flight": 3}}, "there is no url"),
    ],
)
def test_addresses(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        served(teacher)
    assert "sk-secret" not in str(error.value)


def test_one_teacher_elsewhere_and_no_other() -> None:
    teachers = {"math": {"model_name_or_path": "t", "url": URL}, "words": {"model_name_or_path": "u"}}
    tasks = [{"name": "arithmetic", "teacher": "math"}, {"name": "summary", "teacher": "words"}]
    with pytest.raises(RecipeError, match=r"teachers\.math\.url: a teacher that is elsewhere is the only one"):
        parse_skd({"teachers": teachers, "tasks": tasks})


def test_what_a_server_is_asked_for() -> None:
    server = Server.of(served({"server": {"model": "big", "key_env": "KEY", "in_flight": 2}}).the_teacher, 7)
    assert server == Server((URL,), "big", "KEY", 120.0, 600.0, 2, 7)
    assert Server.of(served().the_teacher, 7).model == "org/teacher"


def test_ends_that_differ(tiny_pair: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_pair / "teacher"), "teacher")
    refuse_joined_ends(tokenizer, ())
    with pytest.raises(RecipeError, match=r"</s> \(2\) and <s> \(1\) end a turn .*or set skd\.end_tokens=apart"):
        refuse_joined_ends(tokenizer, (2, 1))


def test_an_engine_with_the_student_alone(tiny_pair: Path) -> None:
    pair = {"teacher": str(tiny_pair / "teacher"), "student": str(tiny_pair / "student")}
    spec = make_spec(**pair, draft_len=0, max_len=100, alone_len=64)
    arguments = spec.arguments()
    assert arguments["model"] == pair["student"]
    assert (arguments["worker_cls"], arguments["scheduler_cls"]) == (STUDENT_WORKER_CLS, SCHEDULER_CLS)
    assert "speculative_config" not in arguments
    assert arguments["max_model_len"] == 65
    assert arguments["additional_config"] == {"skd_vocab_size": 32, "skd_kernels": "auto"}
    assert "speculative_config" in replace(spec, alone_len=None).arguments()
    assert asdict(spec)["alone_len"] == 64
