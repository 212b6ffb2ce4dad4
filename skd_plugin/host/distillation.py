"""The distillation loss where OpenRLHF calls its policy loss.

Shapes: B sequences, T tokens each, N trained tokens of the batch, V vocabulary, K teacher entries.
"""

from __future__ import annotations

from typing import Any

import torch

from skd_plugin.core.losses import Targets, TokenLoss
from skd_plugin.core.trace import Trace


class DistillationLoss(torch.nn.Module):
    """Token losses of the student's logits, which `capture`, a forward hook of the host's Actor, keeps for the one
    call that follows: the host hands its policy loss log-probabilities, and distillation needs logits.
    """

    def __init__(self, token_loss: TokenLoss) -> None:
        super().__init__()
        self._token_loss = token_loss
        self._logits_BTV: torch.Tensor | None = None

    def capture(self, actor: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):  # the training forward; the host's other forwards ask for log-probs only
            self._logits_BTV = output[1]["logits"]

    def forward(self, action_mask: torch.Tensor, sequences_BT: torch.Tensor, traces: list[Trace]) -> torch.Tensor:
        """Loss of every response token [B, T - 1]; 0 elsewhere."""
        logits_BTV, self._logits_BTV = self._logits_BTV, None
        if logits_BTV is None:
            raise RuntimeError("the student's logits were not captured: the host's Actor did not run its hooks")
        return token_losses(logits_BTV, sequences_BT.to(logits_BTV.device), action_mask, traces, self._token_loss)


def token_losses(
    logits_BTV: torch.Tensor,
    sequences_BT: torch.Tensor,
    action_mask: torch.Tensor,
    traces: list[Trace],
    token_loss: TokenLoss,
) -> torch.Tensor:
    """Loss of every response token, in the host's layout [B, T - 1]: entry t belongs to token t + 1; 0 elsewhere.

    Raises:
        RuntimeError: a sequence does not hold the tokens of its trace.
    """
    places = action_mask.bool().nonzero(as_tuple=True)
    taught = taught_tokens(sequences_BT, action_mask, traces)
    values_N = token_loss(logits_BTV[places], Targets.of(taught, logits_BTV.device))
    # A batch without a trained token takes the same way, so that every ZeRO rank runs its backward.
    return values_N.new_zeros(action_mask.shape).index_put(places, values_N)


def taught_tokens(sequences_BT: torch.Tensor, action_mask: torch.Tensor, traces: list[Trace]) -> Trace:
    """The joined record of the response tokens [N] of a batch, in the order of the mask.

    Raises:
        RuntimeError: a sequence does not hold the tokens of its trace; training on it would teach the wrong tokens.
    """
    batch_N, time_N = action_mask.bool().nonzero(as_tuple=True)
    counts = action_mask.bool().sum(1).tolist()
    taught = Trace.join([trace.slice(0, count) for trace, count in zip(traces, counts, strict=True)])
    expected_N = taught.response_ids.to(device=sequences_BT.device, dtype=torch.int64)
    if not torch.equal(sequences_BT[batch_N, time_N + 1], expected_N):
        raise RuntimeError(
            "the response tokens of a training batch are not those of its traces; an executor changed the ids after "
            "sampling (it must never decode and re-tokenise)"
        )
    return taught
