"""How the student's training forward gives the token losses of a batch.

Against the teacher's top-K entries in the traces, or against its whole distribution, from its hidden state of every
response token, which comes with its trace, and its output head, from its checkpoint. Of several teachers the trace
says which one it was.

Shapes: N response tokens of the batch, V vocabulary, J width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from openrlhf.models import aggregate_loss

from skd_plugin.core.chunked import HeadLoss, against_teachers, chunked_scores
from skd_plugin.core.losses import TokenLoss
from skd_plugin.core.targets import Targets
from skd_plugin.core.trace import Trace
from skd_plugin.host.batch import MicroBatch
from skd_plugin.host.end_event import end_tensor

CHECKED_TOKENS = 16  # of each batch, at which the teacher's head must give what the engine's teacher said
HEAD_TOLERANCE = 0.25  # nats, mean over them; bfloat16 logits are rounded to about 0.1


class Distillation(Protocol):
    """How the student's training forward gives the token losses of a batch."""

    def forward_arguments(self, batch: MicroBatch) -> dict[str, Any]:
        """Further arguments of the student's forward."""
        ...

    def token_losses(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        """float32 [N], nats, not yet weighted; `output` is what the model's forward returned."""
        ...


class TopKDistillation:
    """Against the teacher's entries in the traces, from the logits of a student that makes those of all tokens."""

    def __init__(self, token_loss: TokenLoss) -> None:
        self._token_loss = token_loss

    def forward_arguments(self, batch: MicroBatch) -> dict[str, Any]:
        return {}

    def token_losses(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        logits_NV = batch.layout.predictions(output["logits"])
        # A batch without a response token takes the same way, so that every ZeRO rank runs its backward.
        return self._token_loss(logits_NV, Targets.of(batch.tokens, logits_NV.device))


class Foresight:
    """What the gradient of a batch's loss to its token losses will be, where the objective is that loss alone."""

    def __init__(self, *, token_level_loss: bool, alone: bool) -> None:
        """`alone`: the objective is this loss and nothing else, so that its gradient can be foreseen."""
        self._token_level_loss = token_level_loss
        self._alone = alone

    def gradient(self, batch: MicroBatch) -> torch.Tensor | None:
        """[N], up to one factor; None: not foreseen."""
        if not self._alone:
            return None
        values_N = torch.ones(len(batch.layout), device=batch.token_weights_N.device, requires_grad=True)
        weighted = batch.layout.spread(values_N * batch.token_weights_N)
        loss = aggregate_loss(weighted, batch.layout.action_mask, token_level_loss=self._token_level_loss)
        return torch.autograd.grad(loss, values_N)[0]


class ChunkedTopKDistillation:
    """Against the teacher's entries in the traces, in the forward of a ChunkedActor."""

    def __init__(self, token_loss: TokenLoss, foresight: Foresight) -> None:
        """`token_loss`: of the tokens that both models have."""
        self._token_loss = token_loss
        self._foresight = foresight

    def forward_arguments(self, batch: MicroBatch) -> dict[str, HeadLoss]:
        targets = Targets.of(batch.tokens, batch.token_weights_N.device)

        def loss(rows: slice, log_q_CV: torch.Tensor) -> torch.Tensor:
            return self._token_loss(log_q_CV, targets.select(rows))

        return {"head_loss": HeadLoss(loss, self._foresight.gradient(batch))}

    def token_losses(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        return output["token_losses"]


class FullVocabularyDistillation:
    """Against the teacher's whole distribution, from the hidden states in the traces, in the forward of a
    ChunkedActor.
    """

    def __init__(
        self,
        heads: Mapping[str, torch.Tensor],
        token_loss: TokenLoss,
        foresight: Foresight,
        *,
        chunk: int,
        vocab: int,
        end_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            heads: the output head [V, J] of each teacher, what a person calls it -> its head, in the recipe's order.
            token_loss: of `make_token_loss` with `whole_vocabulary_loss`.
            chunk: tokens whose logits are in memory at once.
            vocab: tokens that both models have.
            end_ids: of `joined_ends`.
        """
        self._heads = {name: head_VJ[:vocab] for name, head_VJ in heads.items()}
        self._ends_E = end_tensor(end_ids, next(iter(heads.values())).device)
        self._token_loss = token_loss
        self._foresight = foresight
        self._chunk = chunk

    def forward_arguments(self, batch: MicroBatch) -> dict[str, HeadLoss]:
        """Raises RuntimeError: a head is not that of the engine's teacher."""
        heads = list(self._heads.values())
        targets = Targets.of(batch.tokens, heads[0].device)
        hidden_NJ = batch.tokens.teacher_hidden.to(heads[0])
        for place, (name, head_VJ) in enumerate(self._heads.items()):
            first_N = (batch.tokens.teacher == place).nonzero().squeeze(1)[:CHECKED_TOKENS]
            if len(first_N):
                self._check(name, head_VJ, hidden_NJ, batch.tokens, first_N)

        def loss(rows: slice, log_p_CV: torch.Tensor, log_q_CV: torch.Tensor) -> torch.Tensor:
            return self._token_loss(log_q_CV, replace(targets.select(rows), teacher_logp_NK=log_p_CV))

        teacher_N = batch.tokens.teacher.to(heads[0].device)
        of_chunk = against_teachers(hidden_NJ, heads, teacher_N, loss, self._ends_E)
        return {"head_loss": HeadLoss(of_chunk, self._foresight.gradient(batch))}

    def token_losses(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        return output["token_losses"]

    @torch.no_grad()
    def _check(
        self, name: str, head_VJ: torch.Tensor, hidden_NJ: torch.Tensor, tokens: Trace, rows: torch.Tensor
    ) -> None:
        hidden_CJ = hidden_NJ[rows, : head_VJ.shape[1]]
        tokens_C = tokens.response_ids[rows].to(hidden_NJ.device, torch.int64)
        found_C = chunked_scores(
            hidden_CJ, head_VJ, tokens_N=tokens_C, chunk=self._chunk, ends_E=self._ends_E
        ).log_prob
        gap = (found_C.cpu() - tokens.teacher_logp[rows]).abs().mean().item()
        if not gap <= HEAD_TOLERANCE:
            raise RuntimeError(
                f"the output head of the {name}, applied to its hidden states, gives log-probabilities that are "
                f"{gap:.3g} nats from those of the engine (mean of {len(rows)} tokens; at most {HEAD_TOLERANCE} is "
                "rounding). This teacher's logits are more than a product with its head: use skd.loss.vocabulary=top_k"
            )
