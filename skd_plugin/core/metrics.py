"""Every metric of a run: what it is called, what it is, which direction is better; and those that traces alone tell.

Other parts measure what has no `compute`: training (`rl/*`, `time/*`, the optimizer's) and the evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from skd_plugin.core.trace import NOTHING, Source, Trace


@dataclass(frozen=True)
class Responses:
    """The responses of a step, with at least one token."""

    traces: Sequence[Trace]
    draft_len: int  # gamma, tokens that the student proposes in a block

    @cached_property
    def tokens(self) -> Trace:
        """All tokens of all responses, so that a mean weighs each token the same."""
        return Trace.join(list(self.traces))

    @cached_property
    def drafted(self) -> torch.Tensor:
        """Tokens where the student proposed something, bool."""
        return self.tokens.draft_rank != NOTHING


@dataclass(frozen=True)
class Metric:
    name: str
    title: str
    about: str = ""  # what is counted, and in which unit
    percent: bool = False  # it is a share, and shown in %
    better: Literal["low", "high"] | None = None
    compute: Callable[[Responses], float] | None = None
    # Left out of a step where it is 0, because not every run has such tokens.
    rare: bool = False


def rollout_metrics(traces: Sequence[Trace], draft_len: int) -> dict[str, float]:
    """The metrics of responses that their traces tell, by name. Empty where no response has a token.

    NaN where there is nothing to take a mean of. Args: draft_len: tokens of a block, from which the number of drafted
    tokens follows.
    """
    if not any(len(trace) for trace in traces):
        return {}
    responses, found = Responses(traces, draft_len), {}
    for name, metric in METRICS.items():
        if metric.compute is not None:
            value = metric.compute(responses)
            if value or not metric.rare:
                found[name] = value
    return found


def mean_kl(traces: Sequence[Trace]) -> float:
    """Exact KL(p||q) of the next-token distributions, mean over the tokens of the responses, nats."""
    return _mean_of_known(torch.cat([trace.kl for trace in traces]))


def draft_waste(traces: Sequence[Trace], draft_len: int) -> float:
    """Share of the drafted tokens that were thrown away: after a replacement, or after the end of the response."""
    blocks = emitted = 0
    for trace in traces:
        changed = (trace.rejected_ids != NOTHING) & (trace.rejected_ids != trace.response_ids)
        left = 0
        drafted = trace.draft_rank != NOTHING
        for ends_block, has_draft in zip(changed.tolist(), drafted.tolist(), strict=True):
            if not has_draft:
                left = 0
                continue
            if left == 0:
                blocks, left = blocks + 1, draft_len
            left = 0 if ends_block else left - 1
        emitted += int(drafted.sum())
    return 1.0 - emitted / (blocks * draft_len) if blocks else 0.0


def _accept_rate(responses: Responses) -> float:
    """Of what was put to the gate: not references, whoever drafted them, nor the teacher's legs."""
    source = responses.tokens.source
    proposed = responses.drafted & ~responses.tokens.is_from(Source.REFERENCE, Source.HANDED)
    return (source[proposed] == Source.ACCEPTED).float().mean().item()


def _share_from(source: Source) -> Callable[[Responses], float]:
    return lambda responses: responses.tokens.is_from(source).float().mean().item()


def _first_replaced_place(responses: Responses) -> float:
    """Mean over the responses; one without a replacement counts its length."""
    places = []
    for trace in responses.traces:
        replaced = trace.is_from(Source.REPLACED, Source.RESAMPLED).nonzero()
        places.append(int(replaced[0]) if len(replaced) else len(trace))
    return sum(places) / len(places)


def _mean_of_known(values: torch.Tensor) -> float:
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else float("nan")


_ALL = [
    Metric("skd/loss", "Loss", "mean over the tokens", better="low"),
    Metric(
        "skd/accept_rate", "Acceptance", "kept share of the student's proposals", percent=True, compute=_accept_rate
    ),
    Metric(
        "skd/kl",
        "KL to the teacher",
        "KL(p‖q) while sampling, nats a token",
        better="low",
        compute=lambda responses: mean_kl(responses.traces),
    ),
    Metric(
        "skd/response_len",
        "Response length",
        "tokens, mean of the step",
        compute=lambda responses: len(responses.tokens) / len(responses.traces),
    ),
    Metric(
        "skd/student_entropy",
        "Student entropy",
        "nats a token",
        compute=lambda responses: _mean_of_known(responses.tokens.student_entropy[responses.drafted]),
    ),
    Metric(
        "skd/replaced_frac",
        "Replaced share",
        "tokens that are the teacher's",
        percent=True,
        compute=_share_from(Source.REPLACED),
    ),
    Metric(
        "skd/resampled_frac",
        "Resampled share",
        "tokens of a student that was asked again",
        percent=True,
        compute=_share_from(Source.RESAMPLED),
        rare=True,
    ),
    Metric(
        "skd/handed_frac",
        "Handed share",
        "tokens of the teacher's legs, after the replacing one",
        percent=True,
        compute=_share_from(Source.HANDED),
        rare=True,
    ),
    Metric(
        "skd/flagged_frac",
        "Flagged share",
        "tokens that were rejected, but left in the text",
        percent=True,
        compute=_share_from(Source.FLAGGED),
        rare=True,
    ),
    Metric(
        "skd/reference_frac",
        "Reference share",
        "tokens of given texts",
        percent=True,
        compute=_share_from(Source.REFERENCE),
        rare=True,
    ),
    Metric(
        "skd/undrafted_frac",
        "Undrafted share",
        "tokens that no student proposed",
        percent=True,
        compute=_share_from(Source.UNDRAFTED),
    ),
    Metric("skd/first_replaced_pos", "First replacement", "place in the response", compute=_first_replaced_place),
    Metric(
        "skd/teacher_nll",
        "Teacher's NLL",
        "nats a token of the sampled text",
        compute=lambda responses: -responses.tokens.teacher_logp.mean().item(),
    ),
    Metric(
        "skd/teacher_topk_mass",
        "Teacher mass kept",
        "share inside the entries that the loss sees",
        percent=True,
        compute=lambda responses: responses.tokens.teacher_topk_logp.exp().sum(-1).mean().item(),
    ),
    Metric(
        "skd/draft_waste",
        "Draft waste",
        "proposals thrown away unread",
        percent=True,
        compute=lambda responses: draft_waste(responses.traces, responses.draft_len),
    ),
    Metric("skd/teacher_gap", "Teacher's gap", "log p of the engine against transformers, nats a token; first step"),
    Metric("skd/top_k", "K of the gate", "in the step"),
    Metric("skd/threshold", "Threshold of the gate", "in the step"),
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
    Metric("time/step", "Time of a step", "seconds"),
    Metric("time/rollout", "Time of sampling", "seconds a step"),
    Metric("time/train", "Time of training", "seconds a step"),
    Metric("time/sync", "Time of weight sync", "seconds a step"),
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
