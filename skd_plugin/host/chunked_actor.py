"""The student whose training forward never makes logits [B, T, V].

Its output head reads the few numbers off that are wanted of each response token, chunk by chunk. It does so inside the
model's own forward, so that what holds for a parameter of any module holds here: ZeRO-3 gathers the head before and
releases it after, forward and backward. Prompt and padding tokens are left out.

With ring attention (`setup_ring_attn`) each rank of a ring has a part of the packed tokens, the one that OpenRLHF's
`get_tensor_in_current_ring_attn_rank` cuts out. It reads what is predicted there, and `gather_and_pad_tensor`, as for
OpenRLHF's own log-probabilities, brings the numbers of all ranks together, so that each one has the whole loss.
Backwards it adds up the gradients of the ranks' equal losses, and DeepSpeed's mean over all ranks
takes that factor out again.

Shapes: B sequences, T tokens each, N response tokens of the batch, V vocabulary, H width, M numbers read of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.models import Actor

from skd_plugin.adapters import adapter_of, is_adapted
from skd_plugin.core.chunked import FEW_LOGITS, HeadLoss, chunked_scores
from skd_plugin.core.layout import ResponseLayout
from skd_plugin.host.end_event import end_tensor, end_turns, join_ends_of
from skd_plugin.models import changed_logits


class ChunkedActor(Actor):
    """OpenRLHF's Actor, whose output head is asked for numbers of the response tokens instead of logits of all.

    Results are those of OpenRLHF, but that only response tokens have a log-probability or an entropy, 0 elsewhere,
    that both are of the tokens which both models have, and that `output["logits"]` holds the numbers [B, T, M]. A
    forward with `head_loss` also leaves the token losses in `output["token_losses"]` [N].

    Where `reads_head` is false, its forward is OpenRLHF's.
    """

    def __init__(self, *args: Any, chunk: int | None, vocab: int, end_ids: Sequence[int] = (), **kwargs: Any) -> None:
        """
        Args:
            chunk: tokens whose logits are in memory at once, or more if those are few. None: those of all tokens, as
                in OpenRLHF.
            vocab: tokens that both models have; the student's rows after them are padding, without mass.
            end_ids: of `joined_ends`. All of them will end the trained model's turn.
        """
        super().__init__(*args, **kwargs)
        self.end_ids = tuple(end_ids)
        self._chunk = None if chunk is None else max(chunk, FEW_LOGITS // vocab)
        self._vocab = vocab
        self._compared = False
        head = self.model.get_output_embeddings()
        head = head.get_base_layer() if is_adapted(head) else head
        plain = type(head) is torch.nn.Linear and head.bias is None and changed_logits(self.model.config) is None
        self.reads_head = self._chunk is not None and plain  # its logits are the product of hidden states and weight
        if self.end_ids:
            end_turns(self.model, self.end_ids)
            if not self.reads_head:
                join_ends_of(self.model, self.end_ids)

    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        return_entropy: bool = False,
        head_loss: HeadLoss | None = None,
        ring_attn_group: dist.ProcessGroup | None = None,
        **others: Any,
    ) -> Any:
        """Raises RuntimeError: the model changes what its head returns, which was not known of it."""
        if not self.reads_head:
            asked = dict(return_output=return_output, return_entropy=return_entropy, ring_attn_group=ring_attn_group)
            return super().forward(sequences, action_mask, attention_mask, **asked, **others)
        packed = self.packing_samples
        layout = ResponseLayout.of(action_mask)
        places = ResponseLayout.packed(action_mask, attention_mask) if packed else layout
        own, numbers_NM = slice(0, len(layout)), torch.empty(0)

        def numbers(hidden_BTH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
            """What is read of every response token, where the model expects logits: float32, [B, T, 3] or packed."""
            nonlocal own, numbers_NM
            here, loss = places, head_loss
            if ring_attn_group is not None:
                length = hidden_BTH.shape[1]
                own, here = places.within(dist.get_rank(ring_attn_group) * length, length)
                loss = None if head_loss is None else head_loss.of(own)
            scores = chunked_scores(
                here.predictions(hidden_BTH),
                head_VH,
                tokens_N=here.tokens(sequences),
                chunk=self._chunk,
                vocab=self._vocab,
                ends_E=end_tensor(self.end_ids, hidden_BTH.device),
                entropy=return_entropy,
                loss=loss,
            )
            known = [torch.zeros_like(scores.log_prob) if score is None else score for score in scores]
            numbers_NM = torch.stack(known, dim=-1)
            return here.put(numbers_NM, hidden_BTH)

        with reading_head(self.model.get_output_embeddings(), numbers):
            output = super().forward(
                sequences, None, attention_mask, True, packed, ring_attn_group=ring_attn_group, **others
            )
        found_NM = layout.predictions(output["logits"].flatten(2))  # padded again, where it was packed
        self._compare(found_NM[own], numbers_NM)
        log_prob_N, entropy_N, loss_N = found_NM.unbind(-1)
        output["token_losses"], output["entropy"] = loss_N, layout.spread(entropy_N)
        log_probs = layout.spread(log_prob_N)
        return (log_probs, output) if return_output else log_probs

    @torch.no_grad()
    def _compare(self, found_NM: torch.Tensor, read_NM: torch.Tensor) -> None:
        """Once: the model returned what its head did. One with a soft cap or a scale would not."""
        if self._compared or not len(read_NM):
            return
        self._compared = True
        if not torch.allclose(found_NM, read_NM, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                f"the student ({type(self.model).__name__}) changes what its output head returns in a way that is not "
                "known here; set skd.loss.chunk=null, which keeps the logits of a whole micro-batch in memory"
            )


@contextmanager
def reading_head(head: Any, read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While it is open, a call of the output head gives `read(hidden [B, T, H], weight [V, H])` in place of the
    product of the two. A weight is taken inside the call of the module that has it, where ZeRO-3 has gathered it.

    The logits of a head with an adapter are h W^T + s (A h) B^T: as one product, that of [h, s A h] and [W, B].
    """
    forwards: dict[Any, Callable[[torch.Tensor], torch.Tensor]]
    if is_adapted(head):
        adapter, base = adapter_of(head), head.get_base_layer()
        (name,) = head.active_adapters
        into, out = head.lora_A[name], head.lora_B[name]

        def beside(hidden_BTH: torch.Tensor) -> torch.Tensor:
            low_BTR = adapter.scaling * into(head.lora_dropout[name](hidden_BTH.to(into.weight.dtype)))
            return base(torch.cat([hidden_BTH, low_BTR.to(hidden_BTH)], dim=-1))

        def joined(wide_BTW: torch.Tensor) -> torch.Tensor:
            return read(wide_BTW, torch.cat([base.weight, out.weight.to(base.weight)], dim=1))

        forwards = {head: beside, base: out.__call__, out: joined}
    else:
        forwards = {head: lambda hidden_BTH: read(hidden_BTH, head.weight)}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
