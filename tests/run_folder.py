"""A small run folder as `skd train` leaves it, made without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

WORDS = ["</s>", " tom", " has", " 4", "7", " coins", "\n", " the", " lost"]
EOS, TOM, HAS, FOUR, SEVEN, COINS, NEWLINE, THE, LOST = range(9)


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0]).save_pretrained(folder)
    return folder


def trace(ids: list[int], rejected: dict[int, int] | None = None, **fields: Any) -> dict[str, Any]:
    """A line of traces.jsonl; `rejected`: place -> the id that was rejected there.

    The teacher gives the emitted token 3/4, token 7 (" the") 1/8 and 8 (" lost") 1/16; the student gives it 1/2.
    """
    rejected, length = rejected or {}, len(ids)
    return {
        "step": 1,
        "prompt_ids": [TOM],
        "response_ids": ids,
        "source": "".join("t" if place in rejected else "s" for place in range(length)),
        "rejected_ids": [rejected.get(place, -1) for place in range(length)],
        "draft_rank": [4 if place in rejected else 0 for place in range(length)],
        "student_logp": [math.log(1 / 2)] * length,
        "teacher_logp": [math.log(3 / 4)] * length,
        "kl": [0.25] * length,
        "student_entropy": [0.5] * length,
        "teacher_topk_ids": [[id_, THE, LOST] for id_ in ids],
        "teacher_topk_logp": [[math.log(3 / 4), math.log(1 / 8), math.log(1 / 16)]] * length,
        "finish": "stop",
        "prompt": "how many",
        "response": "".join(WORDS[id_] for id_ in ids if id_ != EOS),
    } | fields


def write_run(
    folder: Path,
    *,
    metrics: list[dict] | None = None,
    traces: list[dict] | None = None,
    student: Path | None = None,
    skd: dict[str, Any] | None = None,
) -> Path:
    """Three steps and two traces unless told otherwise."""
    folder.mkdir(parents=True)
    student = student or write_tokenizer(folder / "model")
    options = {
        "teacher": {"model_name_or_path": "some/teacher"},
        "rollout": {"method": "skd", "top_k": 3, "draft_len": 2, "gate": "top_k", "threshold": None},
        "loss": {"kind": "forward_kl"},
        "run_dir": str(folder),
    }
    host = {
        "actor.model_name_or_path": str(student),
        "ckpt.path": f"{folder}/checkpoints",
        "logger.wandb.key": "wandb-secret",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"openrlhf": host, "skd": options | (skd or {}), "cpu": True}))
    (folder / "status.json").write_text(json.dumps({"stage": "done", "planned_steps": 3}))
    lines(folder / "metrics.jsonl", three_steps() if metrics is None else metrics)
    lines(folder / "traces.jsonl", two_traces() if traces is None else traces)
    return folder


def three_steps(loss: float = 0.3) -> list[dict]:
    steps = [
        {"step": step, "skd/loss": loss / step, "skd/accept_rate": 0.5 + step / 10, "skd/kl": loss / step}
        | {"skd/response_len": 4.0, "skd/student_entropy": 0.5, "time/step": 2.0, "tokens_per_s": 100.0}
        | {"grad_norm": None, "lr": 1e-3, "my/own": 7.0}
        for step in (1, 2, 3)
    ]
    start = [{"step": 0, "eval/sums/teacher_accuracy": 1.0}, {"step": 0, "eval/sums/accuracy": 0.25}]
    return [*start, *steps, {"step": 3, "eval/sums/accuracy": 0.5}]


def two_traces() -> list[dict]:
    return [
        trace([TOM, HAS, FOUR, SEVEN, COINS, EOS], rejected={3: COINS}, kl=[0.1] * 6),
        trace([THE, NEWLINE, COINS], step=3, kl=[0.5, 0.25, 0.0], finish="length"),
    ]


def lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
