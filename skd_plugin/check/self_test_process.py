"""The self-test's own process: an engine, then the same tokens through its models by transformers.

python -m skd_plugin.check.self_test_process sample|compare FOLDER

The two halves are two processes, so that the engine's memory is free again when transformers loads the model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skd_plugin.core.end_event import join_ends
from skd_plugin.core.losses import forward_kl, top_k_loss
from skd_plugin.core.sampling import SamplingSettings
from skd_plugin.core.targets import Targets
from skd_plugin.core.trace import NOTHING, Source, Trace
from skd_plugin.engine.arguments import EngineDescription, EngineSpec
from skd_plugin.models import load_causal_model, response_logits

if TYPE_CHECKING:  # the half that compares does without vLLM
    from skd_plugin.engine.offline import SKDEngine


@dataclass(frozen=True)
class Trial:
    spec: EngineSpec  # of one model in both places, or of the pair
    prompts: list[list[int]]
    max_new_tokens: int

    def write(self, folder: Path) -> None:
        (folder / "trial.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Trial:
        content = json.loads((folder / "trial.json").read_text())
        return cls(**{**content, "spec": EngineSpec(**content["spec"])})


@dataclass(frozen=True)
class Drawn:
    """What the engine has sampled."""

    description: EngineDescription
    traces: list[Trace]
    kept_by_a_shut_gate: int


def sample(engine: SKDEngine, trial: Trial) -> Drawn:
    """Greedy responses at K = 1. Also a few tokens at K = 0, where the gate keeps nothing: with one model in both
    places, K = 1 cannot tell an open gate from SKD's."""
    from skd_plugin.engine.sampling_rule import SamplingRule

    rule = SamplingRule(SamplingSettings(top_k=1, student_temperature=0.0, teacher_temperature=0.0))
    samples = engine.generate(trial.prompts, rule, trial.max_new_tokens)
    shut = engine.generate(trial.prompts[:1], rule.teacher_only(0.0), trial.max_new_tokens)
    kept = int((shut[0].trace.source == Source.ACCEPTED).sum())
    return Drawn(engine.description, [sample.trace for sample in samples], kept)


@dataclass(frozen=True)
class Measured:
    """Over all response tokens together; nats."""

    tokens: int
    proposed: int
    accepted: int
    needless: int  # rejected, and replaced by the same token: the proposal was the teacher's first choice
    widest_rejection: float  # log p(emitted) - log p(proposal), the largest; 0 where nothing was rejected
    mean_loss: float  # forward KL of the engine's distribution from that of transformers, top-K and tail
    max_loss: float
    max_teacher_gap: float  # |log-prob by the engine - by transformers| of an emitted token
    mean_teacher_gap: float
    max_draft_gap: float  # the same for the engine's draft model and the student by transformers
    mean_draft_gap: float


@dataclass(frozen=True)
class Outcome:
    """What both halves together have found."""

    description: EngineDescription
    scheduler: str  # name of the class, as it was asked for
    dtype: str  # of the weights
    kept_by_a_shut_gate: int
    measured: Measured

    def write(self, folder: Path) -> None:
        (folder / "result.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        content = json.loads((folder / "result.json").read_text())
        return cls(**{**content, "measured": Measured(**content["measured"])})


def compare(trial: Trial, drawn: Drawn, dtype: str) -> Measured:
    """What the engine says against plain forwards of its models by transformers, one sequence at a time."""
    vocab, end_ids = drawn.description["vocab_size"], drawn.description["end_ids"]

    def logits_of(model: str) -> torch.Tensor:
        placement = {"device_map": "auto"} if torch.cuda.is_available() else {}
        loaded = load_causal_model(model, getattr(torch, dtype), **placement)
        responses = zip(trial.prompts, drawn.traces, strict=True)
        rows = [response_logits(loaded, prompt, trace.response_ids.tolist()) for prompt, trace in responses]
        logits_RV = torch.cat(rows)[:, :vocab]
        return join_ends(logits_RV, torch.tensor(end_ids)) if end_ids else logits_RV

    of_teacher_RV = logits_of(trial.spec.teacher)
    alone = trial.spec.student == trial.spec.teacher
    return measure(Trace.join(drawn.traces), of_teacher_RV, of_teacher_RV if alone else logits_of(trial.spec.student))


def measure(tokens: Trace, logits_RV: torch.Tensor, student_logits_RV: torch.Tensor) -> Measured:
    """
    Args:
        logits_RV: transformers' logits of the teacher at every token of the joined traces, over the common ids.
        student_logits_RV: those of the student.
    """
    ids_R = tokens.response_ids.long()[:, None]
    logp_R, logq_R = (rows.log_softmax(-1).gather(1, ids_R).squeeze(1) for rows in (logits_RV, student_logits_RV))
    loss_R = top_k_loss(forward_kl)(logits_RV, Targets.of(tokens, logits_RV.device))
    teacher_gap_R = (tokens.teacher_logp - logp_R).abs()
    drafted = tokens.source != Source.UNDRAFTED
    draft_gap_D = (tokens.student_logp - logq_R)[drafted].abs()
    return Measured(
        tokens=len(tokens),
        proposed=int(drafted.sum()),
        accepted=int((tokens.source == Source.ACCEPTED).sum()),
        needless=int((tokens.rejected_ids == tokens.response_ids).sum()),
        widest_rejection=_widest_rejection(tokens, logits_RV),
        mean_loss=loss_R.mean().item(),
        max_loss=loss_R.max().item(),
        max_teacher_gap=teacher_gap_R.max().item(),
        mean_teacher_gap=teacher_gap_R.mean().item(),
        max_draft_gap=draft_gap_D.max().item() if len(draft_gap_D) else float("nan"),
        mean_draft_gap=draft_gap_D.mean().item(),
    )


def _widest_rejection(tokens: Trace, logits_RV: torch.Tensor) -> float:
    rejected = (tokens.rejected_ids != NOTHING).nonzero().squeeze(1)
    if not len(rejected):
        return 0.0
    own = logits_RV[rejected, tokens.response_ids[rejected].long()]
    return (own - logits_RV[rejected, tokens.rejected_ids[rejected].long()]).max().item()


def main(half: str, folder: Path) -> None:
    trial = Trial.read(folder)
    arguments = trial.spec.arguments()
    if half == "sample":
        from skd_plugin.engine.offline import SKDEngine

        torch.save(sample(SKDEngine(trial.spec), trial), folder / "samples.pt")
        return
    drawn: Drawn = torch.load(folder / "samples.pt", weights_only=False)
    scheduler, dtype = arguments["scheduler_cls"].split(".")[-1], arguments["dtype"]
    measured = compare(trial, drawn, dtype)
    Outcome(drawn.description, scheduler, dtype, drawn.kept_by_a_shut_gate, measured).write(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
