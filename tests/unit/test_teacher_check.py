"""The engine's teacher against transformers', on the first responses of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from skd_plugin.core.trace import Trace
from skd_plugin.host.trace_store import TRACE_KEY

PROMPT = 5


def as_read(sample, ids: list[int]) -> list[int]:
    return ids


@pytest.fixture
def check():
    from skd_plugin.host import on_cpu

    on_cpu.install()
    from skd_plugin.host import teacher_check

    return teacher_check


def response(model, length: int, seed: int, *, turns: bool = False):
    """A rollout sample whose trace says what the model says; with several turns, tokens 3 and 4 are an agent's."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 20, (1, PROMPT + length))
    mask = torch.zeros(1, PROMPT + length - 1, dtype=torch.bool)
    mask[:, PROMPT - 1 :] = True
    if turns:
        mask[:, PROMPT + 2 : PROMPT + 4] = False
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].log_softmax(-1)
    own = logp.gather(1, ids[0, 1:, None]).squeeze(1)[mask[0]]
    tokens = ids[0, 1:][mask[0]]
    blank = {name: value.new_zeros(len(own), *value.shape[1:]) for name, value in vars(Trace.empty(2)).items()}
    trace = Trace(**{**blank, "response_ids": tokens.int(), "teacher_logp": own})
    return SimpleNamespace(sequences=ids, action_mask=mask, info={TRACE_KEY: [trace]})


@pytest.fixture
def told(tiny_pair: Path):
    """(model, what an engine says of itself)."""
    path = str(tiny_pair / "teacher")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return model, {"teacher": path, "dtype": "float32", "vocab_size": model.config.vocab_size, "end_ids": []}


def test_the_same_teacher(check, told) -> None:
    model, engine = told
    samples = [response(model, n, n, turns=n > 6) for n in (3, 12, 7, 9, 5, 1)]
    assert check.compare_teachers(samples, engine, as_read, quantised=False) < 1e-5


def test_a_teacher_whose_ends_are_one(check, told) -> None:
    model, engine = told
    sample = response(model, 12, 0)
    sample.sequences[0, -1] = 2
    with torch.no_grad():
        probs = model(sample.sequences).logits[0, PROMPT - 1 : -1].softmax(-1)
    probs[:, 2] += probs[:, 7]
    probs[:, 7] = 0
    (trace,) = sample.info[TRACE_KEY]
    ids = sample.sequences[0, PROMPT:]
    logp = probs.gather(1, ids[:, None]).squeeze(1).log()
    sample.info[TRACE_KEY] = [replace(trace, response_ids=ids.int(), teacher_logp=logp)]
    assert 7 not in ids
    assert check.compare_teachers([sample], engine | {"end_ids": [2, 7]}, as_read, quantised=False) < 1e-5
    assert check.compare_teachers([sample], engine, as_read, quantised=True) > 1e-3


def test_a_teacher_on_its_own_prompt(check, told) -> None:
    """Its log-probabilities are those behind what it has read, and not those behind the student's prompt."""
    model, engine = told
    sample = response(model, 12, 0)
    own = [7, 9, 4, 8, *sample.sequences[0, :PROMPT].tolist()]
    with torch.no_grad():
        logits = model(torch.tensor([own + sample.sequences[0, PROMPT:].tolist()])).logits[0, len(own) - 1 : -1]
    (trace,) = sample.info[TRACE_KEY]
    logp = logits.log_softmax(-1).gather(1, trace.response_ids.long()[:, None]).squeeze(1)
    sample.info[TRACE_KEY] = [replace(trace, teacher_logp=logp)]
    assert check.compare_teachers([sample], engine, lambda _, ids: own, quantised=False) < 1e-5
    assert check.compare_teachers([sample], engine, as_read, quantised=True) > 0.1


def test_another_teacher_ends_the_run_with_both_names_of_the_fault(check, told) -> None:
    model, engine = told
    sample = response(model, 12, 0)
    (trace,) = sample.info[TRACE_KEY]
    sample.info[TRACE_KEY] = [replace(trace, teacher_logp=trace.teacher_logp - 0.5)]
    with pytest.raises(RuntimeError, match=r"log p of 12 sampled tokens is 0\.5000 nats a token away"):
        check.compare_teachers([sample], engine, as_read, quantised=False)
    assert check.compare_teachers([sample], engine, as_read, quantised=True) == pytest.approx(0.5, abs=1e-4)
    sample.info[TRACE_KEY] = [replace(trace, teacher_logp=trace.teacher_logp * float("nan"))]
    with pytest.raises(RuntimeError, match="nan nats a token away"):
        check.compare_teachers([sample], engine, as_read, quantised=False)


def test_a_rounding_that_transformers_cannot_read_is_said(check, told, monkeypatch, capsys) -> None:
    def unread(*_, **__):
        raise ImportError("needs a package")

    model, engine = told
    monkeypatch.setattr(check, "load_causal_model", unread)
    sample = response(model, 3, 0)
    gap = check.compare_teachers([sample], engine, as_read, quantised=True)
    assert gap != gap and "cannot read its rounding: needs a package" in capsys.readouterr().out
    with pytest.raises(ImportError):
        check.compare_teachers([sample], engine, as_read, quantised=False)


def test_long_texts_are_cut_and_go_beyond_a_window(check, told, monkeypatch) -> None:
    model, _ = told
    monkeypatch.setattr(check, "LENGTH", 12)
    samples = [response(model, n, n) for n in (4, 20, 6)]
    (prompt, rest, layout, drawn), *others = check._texts(samples, as_read, 12)
    ids = prompt + rest
    assert not others and len(ids) == 12 and len(layout) == len(drawn) == 7
    assert layout.tokens(torch.tensor([ids])).tolist() == ids[PROMPT:]
    three = check._texts(samples, as_read, 42)
    assert [len(prompt) + len(rest) for prompt, rest, *_ in three] == [25, 11, 6]
    assert len(list(check._texts(samples, as_read, 40))) == 2  # the third would end inside its prompt


def test_a_teacher_without_room_is_said(check, told, monkeypatch, capsys) -> None:
    model, engine = told
    monkeypatch.setattr(check.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert check.compare_teachers([response(model, 3, 0)], engine, as_read, quantised=False) != 0
    assert "is not compared with transformers'" in capsys.readouterr().out
