"""The student as vLLM's draft model, sampled with its own temperature and top-p and remembered in full."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from skd_plugin.compat import cpu
from skd_plugin.core import rng, sampling
from skd_plugin.rollout.requests import RequestTable


class SKDDrafter(DraftModelProposer):
    """Proposes with the request's student settings, where vLLM's own drafter knows only the request's temperature.

    What vLLM keeps as "draft probabilities" is here log q at temperature 1, [B, L, V]; `SKDSampler` is its reader.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any, table: RequestTable) -> None:
        super().__init__(vllm_config, device, runner)
        self._table, self._runner = table, runner
        self._next_position: torch.Tensor | None = None

    def _get_model(self) -> torch.nn.Module:
        with cpu.loadable_weights():
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
        logits_BV = self.model.compute_logits(hidden_states).float()
        rows = self._table.rows(self._runner.input_batch.req_ids)
        noise = rng.uniform(rows.seed, self._next_position, rng.STUDENT)
        probs_BV = sampling.warp(logits_BV, rows.student_temperature, rows.student_top_p)
        self._next_position = self._next_position + 1
        return sampling.draw(probs_BV, noise), logits_BV.log_softmax(-1)
