"""Distillation over the whole vocabulary, from the hidden states of both models.

The teacher's hidden state of every response token comes with its trace, the teacher's output head from its checkpoint.
The student's training forward never makes logits [B, T, V]: its output head reads the few numbers off that are wanted
of each response token. It does so inside the model's own forward, so that what holds for a parameter of any module
holds here: ZeRO-3 gathers the head before and releases it after, forward and backward.

Shapes: B sequences, T tokens each, N response tokens of the batch, V vocabulary, H and J the widths of student and
teacher, M numbers read of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from openrlhf.models import Actor, aggregate_loss

from skd_plugin.core.chunked import Scores, chunked_log_probs, chunked_loss
from skd_plugin.core.layout import ResponseLayout
from skd_plugin.core.losses import TokenLoss
from skd_plugin.core.targets import Targets
from skd_plugin.core.trace import Trace
from skd_plugin.host.batch import MicroBatch

CHECKED_TOKENS = 16  # of each batch, at which the teacher's head must give what the engine's teacher said
HEAD_TOLERANCE = 0.25  # nats, mean over them; bfloat16 logits are rounded to about 0.1

# (the student's hidden states [N, H], its head [V, H], the tokens that follow [N], entropy too?) -> Scores
HeadReader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], Scores]


class FullVocabularyActor(Actor):
    """OpenRLHF's Actor, whose output head is asked for numbers of the response tokens instead of logits of all.

    Results are those of OpenRLHF, but that only response tokens have a log-probability or an entropy, 0 elsewhere, and
    that `output["logits"]` holds the numbers [B, T, M], or
    [1, S, M] where sequences are packed. A forward with `read_head` also leaves the token losses in
    `output["token_losses"]` [N].
    """

    def __init__(self, *args: Any, chunk: int, vocab: int, **kwargs: Any) -> None:
        """`vocab`: tokens that both models have; the student's rows after them are padding, without mass."""
        super().__init__(*args, **kwargs)
        self._chunk = chunk
        self._vocab = vocab

    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        return_entropy: bool = False,
        read_head: HeadReader | None = None,
        **others: Any,
    ) -> Any:
        packed = self.packing_samples
        layout = ResponseLayout.packed(action_mask, attention_mask) if packed else ResponseLayout.of(action_mask)
        tokens_N = layout.tokens(sequences)
        read = read_head or self._read_log_probs

        def numbers(hidden_BTH: torch.Tensor) -> torch.Tensor:
            """What is read of every response token, where the model expects logits: float32, [B, T, 3] or packed."""
            scores = read(layout.predictions(hidden_BTH), head.weight, tokens_N, return_entropy)
            known = [torch.zeros_like(scores.log_prob) if score is None else score for score in scores]
            return layout.put(torch.stack(known, dim=-1), hidden_BTH)

        head = self.model.get_output_embeddings()
        head.forward = numbers  # inside the module's own call, where ZeRO-3 has gathered its weight
        try:
            output = super().forward(sequences, None, attention_mask, return_output=True, **others)
        finally:
            del head.forward
        loss_N, log_prob_N, entropy_N = layout.predictions(output["logits"]).unbind(-1)
        output["token_losses"], output["entropy"] = loss_N, layout.spread(entropy_N)
        log_probs = layout.spread(log_prob_N)
        return (log_probs, output) if return_output else log_probs

    def _read_log_probs(
        self, hidden_NH: torch.Tensor, head_VH: torch.Tensor, tokens_N: torch.Tensor, entropy: bool
    ) -> Scores:
        log_prob, entropy_N = chunked_log_probs(
            hidden_NH, head_VH, tokens_N=tokens_N, chunk=self._chunk, vocab=self._vocab, entropy=entropy
        )
        return Scores(torch.zeros_like(log_prob), log_prob, entropy_N)


class FullVocabularyDistillation:
    """Against the teacher's whole distribution, from the hidden states in the traces; computed in the forward."""

    def __init__(
        self,
        head_VJ: torch.Tensor,
        token_loss: TokenLoss,
        *,
        chunk: int,
        vocab: int,
        token_level_loss: bool,
        alone: bool,
    ) -> None:
        """
        Args:
            head_VJ: the teacher's output head.
            token_loss: of `make_token_loss` with `whole_vocabulary_loss`.
            vocab: tokens that both models have.
            alone: the objective is this loss and nothing else, so that its gradient can be foreseen.
        """
        self._head_VJ = head_VJ[:vocab]
        self._token_loss = token_loss
        self._chunk = chunk
        self._vocab = vocab
        self._token_level_loss = token_level_loss
        self._alone = alone

    def forward_arguments(self, batch: MicroBatch) -> dict[str, HeadReader]:
        """Raises RuntimeError: this head is not the engine's teacher's."""
        targets = Targets.of(batch.tokens, self._head_VJ.device)
        hidden_NJ = batch.tokens.teacher_hidden.to(self._head_VJ)
        if len(batch.tokens):
            self._check(hidden_NJ[:CHECKED_TOKENS], batch.tokens.slice(0, CHECKED_TOKENS))
        expected_N = self._foreseen(batch) if self._alone else None

        def loss(rows: slice, log_p_CV: torch.Tensor, log_q_CV: torch.Tensor) -> torch.Tensor:
            return self._token_loss(log_q_CV, replace(targets.select(rows), teacher_logp_NK=log_p_CV))

        def read_head(hidden_NH: torch.Tensor, head_VH: torch.Tensor, tokens_N: torch.Tensor, entropy: bool) -> Scores:
            return chunked_loss(
                hidden_NH,
                head_VH,
                hidden_NJ,
                self._head_VJ,
                loss,
                tokens_N=tokens_N,
                chunk=self._chunk,
                vocab=self._vocab,
                entropy=entropy,
                expected_N=expected_N,
            )

        return {"read_head": read_head}

    def token_losses(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        return output["token_losses"]

    def _foreseen(self, batch: MicroBatch) -> torch.Tensor:
        """Gradient of the batch's loss to each token loss [N], up to one factor."""
        values_N = torch.ones(len(batch.layout), device=batch.token_weights_N.device, requires_grad=True)
        weighted = batch.layout.spread(values_N * batch.token_weights_N)
        loss = aggregate_loss(weighted, batch.layout.action_mask, token_level_loss=self._token_level_loss)
        return torch.autograd.grad(loss, values_N)[0]

    @torch.no_grad()
    def _check(self, hidden_NJ: torch.Tensor, tokens: Trace) -> None:
        tokens_N = tokens.response_ids.to(hidden_NJ.device, torch.int64)
        found_N, _ = chunked_log_probs(hidden_NJ, self._head_VJ, tokens_N=tokens_N, chunk=self._chunk)
        gap = (found_N.cpu() - tokens.teacher_logp).abs().mean().item()
        if not gap <= HEAD_TOLERANCE:
            raise RuntimeError(
                f"the teacher's output head, applied to its hidden states, gives log-probabilities that are {gap:.3g} "
                f"nats from those of the engine (mean of {len(tokens)} tokens; at most {HEAD_TOLERANCE} is rounding)."
                " This teacher's logits are more than a product with its head: use skd.loss.vocabulary=top_k"
            )
