"""The self-test: the teacher as its own student. Every proposal must stay, and there must be nothing to learn.

This shows that SKD's sampler is the one that runs, and that vLLM and transformers agree on the model. Then the pair of
the recipe: they must agree on the teacher and on the student, side by side in one engine, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from skd_plugin.check.engine_parts import check_parts
from skd_plugin.check.findings import Finding, Level
from skd_plugin.check.self_test_process import Measured, Outcome, Trial
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.schema import SKDConfig
from skd_plugin.engine.arguments import OF_TEACHER, engine_for
from skd_plugin.models import mean_tolerance
from skd_plugin.run.process import run_quietly

NUM_PROMPTS = 4
NEW_TOKENS = 48


TWO_MODELS = (
    "Sampling and training see two models: try openrlhf.ds.attn_implementation=sdpa, skd.vllm={dtype: float32}, or "
    "another vLLM attention backend"
)


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do, by the type of the weights; nats a token."""

    tie: float  # two tokens this close may change places between a draft and its verification
    loss: float
    gap: float  # between the log-probs of two implementations


TOLERANCES = {"float32": Tolerance(tie=1e-3, loss=1e-4, gap=1e-2)}
NARROW = Tolerance(tie=0.25, loss=1e-2, gap=0.5)  # bfloat16 has 8 significant bits: a logit near 32 moves by 1/8


def make_trial(model: str, skd: SKDConfig, options: HostOptions, prompts: list[list[int]], *, cpu: bool) -> Trial:
    """`model` in both places, with the engine options of the recipe, so that what is tested is what will run; but for
    those that make two models of one.
    """
    spec = engine_for(skd, options, student=model, cpu=cpu)
    alike = {name: value for name, value in spec.options.items() if name not in OF_TEACHER}
    return Trial(
        # The loss is compared at a temperature of 1, over the teacher's entries.
        spec=replace(spec, teacher=model, loss_temperature=1.0, teacher_hidden=False, options=alike),
        prompts=prompts,
        max_new_tokens=min(options["rollout.max_new_tokens"] or NEW_TOKENS, NEW_TOKENS),
    )


def make_pair(trial: Trial, skd: SKDConfig, student: str) -> Trial:
    """The same with each model of the recipe in its own place, and all engine options."""
    teacher, options = skd.the_teacher.model_name_or_path, dict(skd.vllm)
    return replace(trial, spec=replace(trial.spec, teacher=teacher, student=student, options=options))


def run_self_test(trial: Trial, folder: Path, progress: Callable[[str], None]) -> list[Finding]:
    """What they print goes to self-test.log in `folder`."""
    outcome = _run(trial, folder, progress)
    if isinstance(outcome, Finding):
        return [outcome]
    return [
        check_parts(outcome.description, outcome.scheduler),
        *judge(outcome.measured, outcome.dtype, outcome.kept_by_a_shut_gate),
    ]


def run_pair_test(trial: Trial, rounding: str | None, folder: Path, progress: Callable[[str], None]) -> Finding:
    """`rounding`: of the teacher's weights, by vLLM or in its files."""
    unread: Level = "failed" if rounding is None else "warning"  # transformers lacks some formats that vLLM has
    outcome = _run(trial, folder, progress, unread)
    return outcome if isinstance(outcome, Finding) else judge_pair(outcome.measured, outcome.dtype, rounding)


def _run(trial: Trial, folder: Path, progress: Callable[[str], None], unread: Level = "failed") -> Outcome | Finding:
    """Both halves in processes of their own. `unread`: how bad it is if transformers cannot read the models."""
    log = folder / "self-test.log"
    trial.write(folder)
    engine = "the engine" if trial.spec.student == trial.spec.teacher else "the engine of teacher and student"
    for half, doing in (("sample", engine), ("compare", "transformers")):
        progress(f"self-test: {doing}")
        error = run_quietly(["skd_plugin.check.self_test_process", half, str(folder)], log)
        if error is not None:
            level = unread if half == "compare" else "failed"
            return Finding("self-test", f"{doing} failed: {error}", level, f"read {log}")
    return Outcome.read(folder)


def judge(measured: Measured, dtype: str, kept_by_a_shut_gate: int) -> list[Finding]:
    limits = TOLERANCES.get(dtype, NARROW)
    return [
        _acceptance(measured, dtype, limits, kept_by_a_shut_gate),
        _loss(measured, dtype, limits),
        _gap(measured, dtype, limits),
    ]


def _acceptance(measured: Measured, dtype: str, limits: Tolerance, kept_by_a_shut_gate: int) -> Finding:
    name, rejected = "self-test: accepted", measured.proposed - measured.accepted
    found = (
        f"{measured.accepted} of {measured.proposed} proposals of the model to itself, greedy, at K = 1; "
        f"{kept_by_a_shut_gate} at K = 0"
    )
    if measured.proposed < measured.tokens or not measured.tokens:
        missing = (
            f"{measured.tokens - measured.proposed} of {measured.tokens} tokens were not proposed by the draft model"
        )
        remedy = "the engine does not draft: it is too small for these sequences, or SKD's sampler does not run"
        return Finding(name, missing, "failed", remedy)
    if kept_by_a_shut_gate or measured.needless:
        what = "keeps what K = 0 rejects" if kept_by_a_shut_gate else "rejects the teacher's first choice"
        return Finding(name, found, "failed", f"the gate {what}: another rule runs; run pytest tests/engine")
    if not rejected:
        return Finding(name, found)
    found += f"; the widest rejection is {measured.widest_rejection:.2g} nats, a tie in {dtype} has {limits.tie:g}"
    if measured.widest_rejection <= limits.tie:
        return Finding(name, f"{found}: ties only")
    return Finding(
        name,
        found,
        "failed",
        "the engine's draft model and model disagree on the same weights: an engine option (skd.vllm) changes one of "
        "the two, or vLLM does; run pytest tests/engine tests/contract",
    )


def _loss(measured: Measured, dtype: str, limits: Tolerance) -> Finding:
    name = "self-test: loss"
    found = (
        f"{abs(measured.mean_loss):.1e} nats a token between the engine's traces and the model by transformers, "
        f"{measured.max_loss:.1e} at most (allowed in {dtype}: {limits.loss:g} in the mean)"
    )
    if math.isfinite(measured.mean_loss) and measured.mean_loss <= limits.loss:
        return Finding(name, found)
    return Finding(
        name,
        found,
        "failed",
        "the student would be trained towards a distribution that transformers does not see in the model: look for "
        "a quantised or wrongly loaded one, and at rope or sliding-window settings in its config.json",
    )


def _gap(measured: Measured, dtype: str, limits: Tolerance) -> Finding:
    found = (
        f"log-probs of the same tokens differ by {measured.max_teacher_gap:.1e} at most, by "
        f"{measured.mean_teacher_gap:.1e} in the mean (as draft model: {measured.max_draft_gap:.1e} at most; usual in "
        f"{dtype}: below {limits.gap:g})"
    )
    if measured.max_teacher_gap <= limits.gap and measured.max_draft_gap <= limits.gap:
        return Finding("vLLM/transformers", found)
    return Finding("vLLM/transformers", found, "warning", TWO_MODELS)


def judge_pair(measured: Measured, dtype: str, rounding: str | None = None) -> Finding:
    """As what a run stops at: means over tokens (host/teacher_check.py, host/objective.py). A teacher whose weights
    are rounded is another model than transformers reads: how far away is said, and no fault.
    """
    name, limit = "teacher and student", mean_tolerance(dtype)
    found = (
        f"in one engine, against transformers: log p of the same tokens differs by {measured.mean_teacher_gap:.1e} in "
        f"the mean and {measured.max_teacher_gap:.1e} at most, log q by {measured.mean_draft_gap:.1e} and "
        f"{measured.max_draft_gap:.1e}"
    )
    if rounding is not None:
        found += f"; the teacher's weights are rounded ({rounding}), which is its distance"
    near = measured.mean_teacher_gap <= limit or (rounding is not None and math.isfinite(measured.mean_teacher_gap))
    if near and measured.mean_draft_gap <= limit:
        return Finding(name, found)
    # A NaN is the student's: nothing was drafted.
    which = "student" if near else "teacher"
    return Finding(
        name,
        f"{found}; in {dtype}, {limit:g} is rounding",
        "failed",
        f"the {which} is not read by vLLM as transformers reads it: a run would end at its first step. {TWO_MODELS}",
    )
