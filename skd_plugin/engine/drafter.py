"""The student as vLLM's draft model, sampled with its own temperature and top-p and remembered in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.utils as layers
from vllm.config import VllmConfig
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from skd_plugin.core import rng, sampling
from skd_plugin.engine.references import follow
from skd_plugin.engine.request_table import RequestTable
from skd_plugin.seams import rebind


@contextmanager
def loadable_weights() -> Iterator[None]:
    """A vLLM model that is loaded inside can be loaded again.

    On a CPU with oneDNN or AMX vLLM packs each weight into a form of its own and drops the original; new weights would
    then be refused, or, worse, be stored where nothing reads them.
    """
    if torch.cuda.is_available():
        yield
        return

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    packing = layers.dispatch_cpu_unquantized_gemm
    rebind(layers, "dispatch_cpu_unquantized_gemm", keep_weight)
    try:
        yield
    finally:
        layers.dispatch_cpu_unquantized_gemm = packing


class SKDDrafter(DraftModelProposer):
    """Proposes with the request's student settings, where vLLM's own drafter knows only the request's temperature.

    What vLLM keeps as "draft probabilities" is here log q at temperature 1, [B, L, V]; `SKDSampler` reads it through
    `take_proposed`, because vLLM itself forgets that of a request whose drafts wait a step.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any, table: RequestTable) -> None:
        super().__init__(vllm_config, device, runner)
        self._table, self._runner = table, runner
        self._next_position: torch.Tensor | None = None
        self._open: dict[str, torch.Tensor] = {}  # request -> log q [L, V] of its proposals that wait for the teacher

    def propose(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens_BL = super().propose(*args, **kwargs)
        # A request that is not in this step (its token budget was spent) keeps its drafts, so they are kept here too.
        self._open = {name: logp for name, logp in self._open.items() if name in self._runner.requests}
        self._open |= zip(self._runner.input_batch.req_ids, self.take_last_draft_probs(), strict=True)
        return tokens_BL

    def take_proposed(self, request_ids: list[str], counts: list[int]) -> torch.Tensor:
        """log q [N, V] of the proposals that are verified now, N the sum of the counts; taken once each.

        Raises:
            RuntimeError: vLLM scheduled drafts that the student did not propose; their law would be unknown.
        """
        missing = [name for name, count in zip(request_ids, counts, strict=True) if count and name not in self._open]
        if missing:
            raise RuntimeError(
                f"vLLM scheduled draft tokens that the student did not propose, for request {missing[0]}: the "
                "engine's max_model_len is too small for its drafts. Start it with the arguments of "
                "skd_plugin.engine.offline.engine_arguments."
            )
        pairs = zip(request_ids, counts, strict=True)
        return torch.cat([self._open.pop(name)[:count] for name, count in pairs if count])

    def _get_model(self) -> torch.nn.Module:
        with loadable_weights():
            return super()._get_model()

    def load_student(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """New weights, by their Hugging Face names; a subset is fine.

        Raises:
            TypeError: of another dtype than the engine's student.
        """
        expected = self.draft_model_config.dtype
        for name, weight in weights:
            if weight.dtype != expected:
                raise TypeError(f"{name} is {weight.dtype}, but the engine's student is {expected}")
        self.model.load_weights(weights=weights)

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> tuple[int, torch.Tensor, Any]:
        num_tokens, indices_to_sample, attention_metadata = super().set_inputs_first_pass(*args, **kwargs)
        self._next_position = self.positions[indices_to_sample].to(torch.int64) + 1
        return num_tokens, indices_to_sample, attention_metadata

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BV = self.model.compute_logits(hidden_states).float()[:, : self._table.vocab_size]
        logits_BV = self._table.finite(logits_BV, "student")
        rows, position_B = self._table.rows(self._runner.input_batch.req_ids), self._next_position
        noise = rng.uniform(rows.seed_B, position_B, rng.STUDENT)
        probs_BV = sampling.warp(logits_BV, rows.settings.student_temperature, rows.settings.student_top_p)
        self._next_position = position_B + 1
        token_B = follow(rows.forced_BF, position_B - rows.prompt_len_B, sampling.draw(probs_BV, noise))
        return token_B, logits_BV.log_softmax(-1)
