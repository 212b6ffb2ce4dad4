"""Every metric of a run: what it is called, what it is, which direction is better; and those that traces alone tell.

Each of these is a ratio of two sums over tokens or responses. So the sums are made where a trace is, and a step's
metric is a ratio of sums of sums. Other parts measure what has no `ratio`: training (`rl/*`, `time/*`, the
optimizer's) and the evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from skd_plugin.core.trace import NOTHING, OVERLAP, Source, Trace


class Ratio(NamedTuple):
    """What a metric is of one response, or of several."""

    part: float
    whole: float

    @classmethod
    def mean(cls, values: Any) -> Ratio:
        """Of an array of numpy."""
        return cls(float(values.sum(dtype=float)), len(values))

    @classmethod
    def mean_of_known(cls, values: Any) -> Ratio:
        """Of one that may have NaN in it."""
        return cls.mean(values[values == values])

    @classmethod
    def total(cls, ratios: Sequence[Ratio]) -> Ratio:
        """To the last digit the same in whatever order the responses came."""
        return cls(math.fsum(ratio.part for ratio in ratios), math.fsum(ratio.whole for ratio in ratios))


Figures = dict[str, Ratio]  # of one response, by the name of the metric


@dataclass(frozen=True)
class Metric:
    name: str
    title: str
    about: str = ""  # what is counted, and in which unit
    percent: bool = False  # it is a share, and shown in %
    better: Literal["low", "high"] | None = None
    # Of a response, and of gamma, the tokens that the student proposes in a block.
    ratio: Callable[[_Tokens, int | None], Ratio] | None = None
    of_nothing: float = float("nan")  # its value where the whole is 0
    # Left out of a step where it is 0, because not every run has such tokens.
    rare: bool = False


def figures_of(trace: Trace, draft_len: int | None) -> Figures:
    """What a response adds to each metric that traces tell.

    Args:
        draft_len: tokens of a block, from which the number of drafted tokens follows; None: blocks differ.
    """
    tokens = _Tokens.of(trace)
    return {name: metric.ratio(tokens, draft_len) for name, metric in METRICS.items() if metric.ratio is not None}


def rollout_metrics(figures: Sequence[Figures]) -> dict[str, float]:
    """The metrics of responses that their traces tell, by name; a mean over tokens weighs each token the same.

    Empty where no response has a token. NaN where there is nothing to take a mean of.
    """
    found: dict[str, float] = {}
    if not any(of_one["skd/response_len"].part for of_one in figures):
        return found
    for name in figures[0]:
        value = metric_of(name, figures)
        if value or not METRICS[name].rare:
            found[name] = value
    return found


def metric_of(name: str, figures: Sequence[Figures]) -> float:
    """One of these metrics."""
    part, whole = Ratio.total([of_one[name] for of_one in figures])
    return part / whole if whole else METRICS[name].of_nothing


@dataclass(frozen=True)
class _Tokens:
    """Of a trace, as numpy has them: on the few tokens of a response its operators take half of PyTorch's time."""

    trace: Trace
    source: Any
    drafted: Any  # bool, tokens where the student proposed something

    @classmethod
    def of(cls, trace: Trace) -> _Tokens:
        return cls(trace, trace.source.numpy(), trace.draft_rank.numpy() != NOTHING)

    def __len__(self) -> int:
        return len(self.source)

    def known(self, name: str) -> Ratio:
        """The mean of a field where it is known."""
        return Ratio.mean_of_known(getattr(self.trace, name).numpy())

    def known_of_drafted(self, name: str) -> Ratio:
        return Ratio.mean_of_known(getattr(self.trace, name).numpy()[self.drafted])


def _draft_waste(tokens: _Tokens, draft_len: int | None) -> Ratio:
    """Drafted tokens that were thrown away: after a replacement, or after the end of the response."""
    if draft_len is None:
        return Ratio(math.nan, 1)  # a trace does not say how long its blocks were
    rejected = tokens.trace.rejected_ids.numpy()
    changed = (rejected != NOTHING) & (rejected != tokens.trace.response_ids.numpy())
    blocks = left = 0
    for ends_block, has_draft in zip(changed.tolist(), tokens.drafted.tolist(), strict=True):
        if not has_draft:
            left = 0
            continue
        if left == 0:
            blocks, left = blocks + 1, draft_len
        left = 0 if ends_block else left - 1
    return Ratio(blocks * draft_len - int(tokens.drafted.sum()), blocks * draft_len)


def _accept_rate(tokens: _Tokens, draft_len: int | None) -> Ratio:
    """Of what was put to the gate: not references, whoever drafted them, nor the teacher's legs."""
    proposed = tokens.source[tokens.drafted]
    return Ratio.mean(proposed[(proposed != Source.REFERENCE) & (proposed != Source.HANDED)] == Source.ACCEPTED)


def _share_from(source: Source) -> Callable[[_Tokens, int | None], Ratio]:
    return lambda tokens, draft_len: Ratio.mean(tokens.source == source)


def _first_replaced_place(tokens: _Tokens, draft_len: int | None) -> Ratio:
    """A response without a replacement counts its length."""
    replaced = (tokens.source == Source.REPLACED) | (tokens.source == Source.RESAMPLED)
    return Ratio(int(replaced.argmax()) if replaced.any() else len(tokens), 1)


_ALL = [
    Metric("skd/loss", "Loss", "mean over the tokens", better="low"),
    Metric("skd/accept_rate", "Acceptance", "kept share of the student's proposals", percent=True, ratio=_accept_rate),
    Metric(
        "skd/kl",
        "KL to the teacher",
        "KL(p‖q) while sampling, nats a token",
        better="low",
        ratio=lambda tokens, draft_len: tokens.known("kl"),
    ),
    Metric(
        "skd/response_len",
        "Response length",
        "tokens, mean of the step",
        ratio=lambda tokens, draft_len: Ratio(len(tokens), 1),
    ),
    Metric(
        "skd/student_entropy",
        "Student entropy",
        "nats a token",
        ratio=lambda tokens, draft_len: tokens.known_of_drafted("student_entropy"),
    ),
    Metric(
        "skd/teacher_entropy",
        "Teacher entropy",
        "nats a token",
        ratio=lambda tokens, draft_len: tokens.known("teacher_entropy"),
    ),
    Metric(
        "skd/top_overlap",
        "Overlap at the top",
        f"share of the teacher's {OVERLAP} first tokens that are among the student's {OVERLAP}",
        percent=True,
        ratio=lambda tokens, draft_len: tokens.known_of_drafted("top_overlap"),
    ),
    Metric(
        "skd/same_first",
        "Same first choice",
        "tokens where both models' most probable one is the same",
        percent=True,
        ratio=lambda tokens, draft_len: tokens.known_of_drafted("same_first"),
    ),
    Metric("skd/truncated_frac", "Cut off", "responses that reach the length limit", percent=True),
    Metric(
        "skd/replaced_frac",
        "Replaced share",
        "tokens that are the teacher's",
        percent=True,
        ratio=_share_from(Source.REPLACED),
    ),
    Metric(
        "skd/resampled_frac",
        "Resampled share",
        "tokens of a student that was asked again",
        percent=True,
        ratio=_share_from(Source.RESAMPLED),
        rare=True,
    ),
    Metric(
        "skd/handed_frac",
        "Handed share",
        "tokens of the teacher's legs, after the replacing one",
        percent=True,
        ratio=_share_from(Source.HANDED),
        rare=True,
    ),
    Metric(
        "skd/flagged_frac",
        "Flagged share",
        "tokens that were rejected, but left in the text",
        percent=True,
        ratio=_share_from(Source.FLAGGED),
        rare=True,
    ),
    Metric(
        "skd/reference_frac",
        "Reference share",
        "tokens of given texts",
        percent=True,
        ratio=_share_from(Source.REFERENCE),
        rare=True,
    ),
    Metric(
        "skd/undrafted_frac",
        "Undrafted share",
        "tokens that no student proposed",
        percent=True,
        ratio=_share_from(Source.UNDRAFTED),
    ),
    Metric("skd/first_replaced_pos", "First replacement", "place in the response", ratio=_first_replaced_place),
    Metric(
        "skd/teacher_nll",
        "Teacher's NLL",
        "nats a token of the sampled text",
        ratio=lambda tokens, draft_len: Ratio.mean(-tokens.trace.teacher_logp.numpy()),
    ),
    Metric(
        "skd/teacher_topk_mass",
        "Teacher mass kept",
        "share inside the entries that the loss sees",
        percent=True,
        ratio=lambda tokens, draft_len: Ratio.mean(tokens.trace.teacher_topk_logp.exp().sum(-1).numpy()),
    ),
    Metric(
        "skd/draft_waste",
        "Draft waste",
        "proposals thrown away unread",
        percent=True,
        ratio=_draft_waste,
        of_nothing=0.0,
    ),
    Metric("skd/teacher_gap", "Teacher's gap", "log p of the engine against transformers, nats a token; first step"),
    Metric("skd/top_k", "K of the gate", "in the step"),
    Metric("skd/threshold", "Threshold of the gate", "in the step"),
    Metric("skd/prompt_weight", "Weight of a prompt", "mean over the responses, before all are scaled to a mean of 1"),
    Metric("skd/horizon", "Horizon", "tokens at which responses were cut in the step"),
    Metric("skd/staleness", "Staleness", "updates of the student since it proposed a token"),
    Metric("skd/kd_coef", "Weight of the distillation", "in the loss of two terms"),
    Metric("rl/reward", "Reward", "mean of the training responses"),
    Metric("rl/return", "Return", "mean of the training responses, with the penalties"),
    Metric("rl/loss", "Policy loss"),
    Metric("rl/coef", "Weight of the policy loss"),
    Metric("rl/own_frac", "Tokens of the policy loss", "share that the student sampled", percent=True),
    Metric("rl/clip_ratio", "Clipped share", "tokens of the policy loss beyond the clip", percent=True),
    Metric("rl/kl_to_old", "KL to the old policy", "of the policy since the rollout, nats a token"),
    Metric("rl/kl_to_reference", "KL to the reference model", "nats a token"),
    Metric("rl/kl_to_rollout", "KL to the sampled policy", "with off-policy correction, nats a token"),
    Metric("rl/filtered_frac", "Filtered share", "tokens that the off-policy correction left out", percent=True),
    Metric("rl/filter_pass_rate", "Prompts kept", "share that dynamic filtering kept", percent=True),
    Metric("rl/critic_loss", "Critic's loss"),
    Metric("time/step", "Time of a step", "seconds, evaluations left out"),
    Metric("time/rollout", "Time of sampling", "seconds a step"),
    Metric("time/train", "Time of training", "seconds a step, with the weight sync"),
    Metric("time/draft", "Drafting", "seconds a step: the student's proposals"),
    Metric("time/verify", "Verifying", "seconds a step: the teacher's forwards"),
    Metric("time/sample", "Gate and sampler", "seconds a step"),
    Metric("time/record", "Recording", "seconds a step: what the traces say"),
    Metric("time/schedule", "Scheduling", "seconds a step: the engine's own, with what it keeps of requests"),
    Metric("time/requests", "Requests", "seconds a step that no engine works: tokenizers, rewards, agents, Ray"),
    Metric("time/traces", "Trace transfer", "seconds a step"),
    Metric("time/metrics", "Metrics", "seconds a step, with traces.jsonl"),
    Metric("time/experience", "Experience", "seconds a step: batches, and further models' forwards with rewards"),
    Metric("time/batches", "Micro-batches", "seconds a step"),
    Metric("time/forward", "Training forward", "seconds a step, with the loss"),
    Metric("time/backward", "Backward", "seconds a step"),
    Metric("time/optimizer", "Optimizer", "seconds a step"),
    Metric("time/sync", "Time of weight sync", "seconds a step"),
    Metric("time/ray", "Waiting for the trainers", "seconds a step beyond their own: Ray, a critic"),
    Metric("time/save", "Logs and checkpoint", "seconds, of the step before"),
    Metric("time/queue", "Waiting for responses", "seconds a step, of an asynchronous run"),
    Metric("time/rest", "Rest of a step", "seconds"),
    Metric("tokens_per_s", "Throughput", "response tokens a second, training included"),
    Metric("grad_norm", "Gradient norm"),
    Metric("lr", "Learning rate"),
]
METRICS = {metric.name: metric for metric in _ALL}  # in the order of a report

_OF_EVALUATIONS = [
    Metric("accuracy", "Accuracy", "held-out prompts, student alone", percent=True, better="high"),
    Metric("teacher_accuracy", "Accuracy of the teacher", "held-out prompts", percent=True),
    Metric("chrf", "chrF", "held-out prompts, student alone", percent=True, better="high"),
    Metric("teacher_chrf", "chrF of the teacher", "held-out prompts", percent=True),
    Metric("rouge_l", "ROUGE-L", "held-out prompts, student alone", percent=True, better="high"),
    Metric("teacher_rouge_l", "ROUGE-L of the teacher", "held-out prompts", percent=True),
    Metric("kl", "Held-out KL", "KL(p‖q) along the student's own responses, nats a token", better="low"),
    Metric("response_len", "Held-out length", "tokens"),
    Metric("teacher_response_len", "Response length of the teacher", "tokens, held-out prompts"),
]
EVALUATIONS = {metric.name: metric for metric in _OF_EVALUATIONS}  # by the last part of eval/<task>/<name>
