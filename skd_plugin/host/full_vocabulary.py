"""Distillation over the whole vocabulary, from the hidden states of both models.

The teacher's hidden state of every response token comes with its trace, the teacher's output head from its checkpoint.
The student's training forward never makes logits [B, T, V]: its output head reads the few numbers off that are wanted
of each response token. It does so inside the model's own forward, so that what holds for a parameter of any module
holds here: ZeRO-3 gathers the head before and releases it behind, forward and backward.

Shapes: B sequences, T tokens each, N response tokens of the batch, V vocabulary, H and J the widths of student and
teacher, M numbers read of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from openrlhf.models import Actor, aggregate_loss

from skd_plugin.core.chunked import Scores, chunked_log_probs, chunked_loss
from skd_plugin.core.losses import Targets, TokenLoss
from skd_plugin.core.trace import Trace
from skd_plugin.host.distillation import taught_tokens
from skd_plugin.host.lesson import Lesson

CHECKED_TOKENS = 16  # of each batch, at which the teacher's head must give what the engine's teacher said
HEAD_TOLERANCE = 0.25  # nats, mean over them; bfloat16 logits are rounded to about 0.1

# (the student's hidden states [N, H], its head [V, H], the tokens that follow [N], entropy too?) -> Scores
Reader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], Scores]


class FullVocabularyActor(Actor):
    """OpenRLHF's Actor, whose output head is asked for numbers of the response tokens instead of logits of all.

    Results are those of the host, but that only response tokens have a log-probability or an entropy, 0 elsewhere, and
    that `output["logits"]` holds the numbers [B, T, M]. After `learn`, one training forward also leaves the token
    losses in `output["token_losses"]` [B, T - 1].
    """

    def __init__(self, *args: Any, chunk: int, vocab: int, **kwargs: Any) -> None:
        """`vocab`: tokens that both models have; the student's rows behind them are padding, without mass."""
        super().__init__(*args, **kwargs)
        self._chunk = chunk
        self._vocab = vocab
        self._lesson: Reader | None = None
        self._read_head: Callable[..., torch.Tensor] | None = None
        head = self.model.get_output_embeddings()
        head.forward = lambda hidden_BTH: self._read_head(hidden_BTH, head.weight)

    def learn(self, lesson: Reader) -> None:
        """How the next forward reads the student's head, when it is a training forward."""
        self._lesson = lesson

    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        return_entropy: bool = False,
        **others: Any,
    ) -> Any:
        lesson, self._lesson = self._lesson, None
        read = lesson if return_output and lesson else self._read_log_probs
        batch_N, time_N = places = action_mask.bool().nonzero(as_tuple=True)
        tokens_N = sequences[batch_N, time_N + 1]
        self._read_head = partial(_numbers, read=read, places=places, tokens_N=tokens_N, entropy=return_entropy)
        output = super().forward(sequences, None, attention_mask, return_output=True, **others)
        self._read_head = None
        numbers = Scores(*output["logits"][:, :-1].unbind(-1))
        output["token_losses"], output["entropy"] = numbers.loss if lesson else None, numbers.entropy
        return (numbers.log_prob, output) if return_output else numbers.log_prob

    def _read_log_probs(
        self, hidden_NH: torch.Tensor, head_VH: torch.Tensor, tokens_N: torch.Tensor, entropy: bool
    ) -> Scores:
        log_prob, entropy_N = chunked_log_probs(
            hidden_NH, head_VH, tokens_N=tokens_N, chunk=self._chunk, vocab=self._vocab, entropy=entropy
        )
        return Scores(torch.zeros_like(log_prob), log_prob, entropy_N)


def _numbers(
    hidden_BTH: torch.Tensor,
    head_VH: torch.Tensor,
    read: Reader,
    places: tuple[torch.Tensor, torch.Tensor],
    tokens_N: torch.Tensor,
    entropy: bool,
) -> torch.Tensor:
    """What is read of every response token where the model expects logits: float32 [B, T, 3]."""
    scores = read(hidden_BTH[places], head_VH, tokens_N, entropy)
    known = [torch.zeros_like(scores.log_prob) if score is None else score for score in scores]
    numbers_BTM = hidden_BTH.new_zeros((*hidden_BTH.shape[:2], len(known)), dtype=torch.float32)
    return numbers_BTM.index_put(places, torch.stack(known, dim=-1))


class FullVocabularyLoss(torch.nn.Module):
    """In the place of `DistillationLoss`: the token losses that the actor has computed in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self._values_BT: torch.Tensor | None = None

    def capture(self, actor: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):  # the training forward
            self._values_BT = output[1]["token_losses"]

    def forward(self, action_mask: torch.Tensor, sequences_BT: torch.Tensor, traces: list[Trace]) -> torch.Tensor:
        """Loss of every response token [B, T - 1]; 0 elsewhere."""
        values_BT, self._values_BT = self._values_BT, None
        if values_BT is None:
            raise RuntimeError(
                "token losses were not captured: the host's Actor did not run its hooks, or ran without the teacher's "
                "hidden states (FullVocabularyActor.learn)"
            )
        return values_BT


class FullVocabularyTeacher:
    """Makes of a batch's traces what `FullVocabularyActor.learn` is given."""

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

    def lesson(self, lesson: Lesson, action_mask: torch.Tensor) -> Reader:
        """Raises RuntimeError: the tokens are not those of the traces, or this head is not the engine's teacher's."""
        taught = taught_tokens(lesson.sequences.to(action_mask.device), action_mask, lesson.traces)
        targets = Targets.of(taught, self._head_VJ.device)
        hidden_NJ = taught.teacher_hidden.to(self._head_VJ)
        if len(taught):
            self._check(hidden_NJ[:CHECKED_TOKENS], taught.slice(0, CHECKED_TOKENS))
        expected_N = self._foreseen(lesson.weights, action_mask) if self._alone else None

        def loss(rows: slice, log_p_CV: torch.Tensor, log_q_CV: torch.Tensor) -> torch.Tensor:
            return self._token_loss(log_q_CV, replace(targets.select(rows), teacher_logp_NK=log_p_CV))

        def read(hidden_NH: torch.Tensor, head_VH: torch.Tensor, tokens_N: torch.Tensor, entropy: bool) -> Scores:
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

        return read

    def _foreseen(self, weights_BT: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        """Gradient of the batch's loss to each token loss [N], up to one factor."""
        values_BT = torch.ones(action_mask.shape, device=action_mask.device, requires_grad=True)
        weighted_BT = values_BT * weights_BT.to(action_mask.device)
        loss = aggregate_loss(weighted_BT, action_mask, token_level_loss=self._token_level_loss)
        return torch.autograd.grad(loss, values_BT)[0][action_mask.bool()]

    @torch.no_grad()
    def _check(self, hidden_NJ: torch.Tensor, taught: Trace) -> None:
        tokens_N = taught.response_ids.to(hidden_NJ.device, torch.int64)
        found_N, _ = chunked_log_probs(hidden_NJ, self._head_VJ, tokens_N=tokens_N, chunk=self._chunk)
        gap = (found_N.cpu() - taught.teacher_logp).abs().mean().item()
        if not gap <= HEAD_TOLERANCE:
            raise RuntimeError(
                f"the teacher's output head, applied to its hidden states, gives log-probabilities that are {gap:.3g} "
                f"nats from those of the engine (mean of {len(taught)} tokens; at most {HEAD_TOLERANCE} is rounding)."
                " This teacher's logits are more than a product with its head: use skd.loss.vocabulary=top_k"
            )
