"""The student as vLLM's draft model, sampled with its own temperature and top-p and remembered in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import vllm.model_executor.layers.utils as layers
from vllm.config import VllmConfig, replace
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from skd_plugin.core import rng
from skd_plugin.core.end_event import join_ends_
from skd_plugin.core.logit_rows import LogitRows
from skd_plugin.core.trace import NOTHING
from skd_plugin.engine.references import follow
from skd_plugin.engine.request_table import RequestRows, RequestTable
from skd_plugin.engine.student_prompt import StudentPrompts, own_table
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


class Drafting:
    """The drafts of one step while they are made, for B requests.

    vLLM hands it through, unread, as the sampling metadata of `propose`.
    """

    def __init__(self, rows: RequestRows, position_B: torch.Tensor, draft_len: int) -> None:
        """Args: position_B: int64, of the next token to draft, to the student."""
        self.rows, self.place = rows, 0
        self.position_LB = position_B + torch.arange(draft_len, device=position_B.device)[:, None]
        self.row_LB = torch.arange(self.position_LB.numel(), device=position_B.device).view_as(self.position_LB)
        self.noise_LB = rng.uniform(rows.seed_B, self.position_LB, rng.STUDENT)
        self.logits_LBV: torch.Tensor | None = None  # in the type in which the student's head makes them


class SKDDrafter(DraftModelProposer):
    """Proposes with the request's student settings, where vLLM's own drafter knows only the request's temperature.

    What it has proposed with waits in the request table for the sampler.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any, table: RequestTable, rows: type[LogitRows]
    ) -> None:
        """Args: rows: how logits are read."""
        super().__init__(vllm_config, device, runner)
        self._table, self._runner, self._rows = table, runner, rows

    def _create_draft_vllm_config(self) -> VllmConfig:
        """vLLM's, with the student's own attention window: it would give the student's layers the teacher's."""
        base = super()._create_draft_vllm_config()
        model = base.model_config
        kinds = getattr(model.hf_text_config, "layer_types", None)
        same = kinds is None or all(kind == "sliding_attention" for kind in kinds)
        window = model.get_sliding_window() if same else None  # as EngineArgs.create_engine_config takes the teacher's
        return replace(base, cache_config=replace(base.cache_config, sliding_window=window))

    def _get_model(self) -> torch.nn.Module:  # of load_model
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

    def propose(
        self,
        num_speculative_tokens: int,
        *,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Drafted tokens [B, L]; the runner's `propose_draft_token_ids` asks for those of every request."""
        request_ids = self._runner.input_batch.req_ids
        read_B = common_attn_metadata.seq_lens.to(torch.int64)  # tokens of each request that the teacher has read
        # prepare_inputs_padded leaves the rejected drafts in these lengths
        kept_B = read_B if num_rejected_tokens_gpu is None else read_B - num_rejected_tokens_gpu
        rows = self._table.rows(request_ids)
        next_B = kept_B + 1 - rows.shift_B  # set_inputs_first_pass adds the sampled one
        drafting = Drafting(rows, next_B, num_speculative_tokens)
        with self._table.clock.part("draft"):
            tokens_BL = super().propose(
                num_speculative_tokens=num_speculative_tokens,
                common_attn_metadata=common_attn_metadata,
                sampling_metadata=drafting,
                num_rejected_tokens_gpu=num_rejected_tokens_gpu,
                **others,
            )
        assert drafting.logits_LBV is not None
        self._table.keep_proposals(request_ids, drafting.logits_LBV, tokens_BL)
        return tokens_BL

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> tuple[int, torch.Tensor, Any]:
        """The tokens that the student reads before it drafts: their number, places to sample at [B], attention."""
        _, sample_B, attention = laid_out = super().set_inputs_first_pass(*args, **kwargs)
        rows = self._table.rows(self._runner.input_batch.req_ids)
        if rows.student_prompts is None:
            return laid_out
        return self._on_own_prompts(rows, rows.student_prompts, sample_B, attention)

    def _on_own_prompts(
        self, rows: RequestRows, prompts: StudentPrompts, sample_B: torch.Tensor, attention: Any
    ) -> tuple[int, torch.Tensor, Any]:
        """vLLM's tokens of the step, for a student that stands `shift` places before the teacher: its positions, the
        tokens of its own prompts, and the blocks and slots that follow from them.
        """
        device, size = self.device, self.block_size
        first_B = self._runner.input_batch.num_computed_tokens_cpu[: len(rows.params)]  # before this step
        reading = prompts.reading(first_B, attention.query_start_loc_cpu.numpy())
        number = len(reading.row_N)
        starts, shift_B = torch.from_numpy(reading.starts), torch.from_numpy(prompts.shift_B)
        kept_N, row_N, ids_N = torch.from_numpy(np.stack(reading[:3])).to(device)
        position_N = self.positions[kept_N] - rows.shift_B[row_N]  # below 0 where nothing of the student begins yet
        unwritten_N = (attention.slot_mapping[kept_N] < 0) | (position_N < 0)
        position_N = position_N.clamp(min=0)
        has_begun_B = torch.from_numpy(reading.has_begun_B).to(device)
        table_BW = own_table(attention.block_table_tensor, rows.shift_B // size, has_begun_B)
        slot_N = table_BW[row_N, position_N // size].long() * size + position_N % size
        self.input_ids[:number] = torch.where(ids_N == NOTHING, self.input_ids[kept_N].long(), ids_N)
        self.positions[:number] = position_N
        own_starts = starts.to(device)
        left_out_B = (attention.query_start_loc - own_starts)[1:]  # tokens, of a request and those before it
        own = attention.replace(
            query_start_loc=own_starts,
            query_start_loc_cpu=starts,
            seq_lens=_fewer(attention.seq_lens, rows.shift_B),
            num_actual_tokens=number,
            max_query_len=int(np.diff(reading.starts).max()),
            block_table_tensor=table_BW,
            slot_mapping=slot_N.masked_fill(unwritten_N, PADDING_SLOT_ID),
            _seq_lens_cpu=_fewer(attention._seq_lens_cpu, shift_B),
            seq_lens_cpu_upper_bound=_fewer(attention.seq_lens_cpu_upper_bound, shift_B),
            _num_computed_tokens_cpu=None,  # made anew of the lengths by those who ask
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return number, torch.maximum(sample_B - left_out_B, own_starts[:-1]), own

    def _update_positions_dependent_metadata(
        self, positions: torch.Tensor, common_attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """What is drafted behind a part of a prompt is thrown away. It must not be written, either: the student may
        stand in a block there that another request reads.
        """
        rows = self._table.rows(self._runner.input_batch.req_ids)
        if rows.student_prompts is not None:
            whole_B = positions >= rows.prompt_len_B - 1
            common_attn_metadata.block_table_tensor = common_attn_metadata.block_table_tensor * whole_B[:, None]
        return super()._update_positions_dependent_metadata(positions, common_attn_metadata, *args, **kwargs)

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Drafting
    ) -> tuple[torch.Tensor, None]:
        """The next token of each request [B]; vLLM has no use for its distribution."""
        drafting, rows = sampling_metadata, sampling_metadata.rows
        logits_BV = self.model.compute_logits(hidden_states)[:, : self._table.vocab_size]
        place, drafting.place = drafting.place, drafting.place + 1
        if drafting.logits_LBV is None:
            assert logits_BV.shape[0] == drafting.position_LB.shape[1]
            drafting.logits_LBV = logits_BV.new_empty(len(drafting.position_LB), *logits_BV.shape)
        drafting.logits_LBV[place] = logits_BV
        if self._table.ends_E is not None:
            join_ends_(drafting.logits_LBV[place], self._table.ends_E)
        own = self._rows(drafting.logits_LBV.flatten(0, 1), drafting.row_LB[place])
        token_B = own.sample(rows.settings, "student", drafting.noise_LB[place])
        if rows.forced_BF is not None:
            token_B = follow(rows.forced_BF, drafting.position_LB[place] - rows.prompt_len_B, token_B)
        return token_B, None


def _fewer(lengths_B: torch.Tensor | None, shift_B: torch.Tensor) -> Any:
    """Lengths of the student's sequences, of those of the teacher's, where there are any."""
    return None if lengths_B is None else (lengths_B - shift_B).clamp(min=1).to(lengths_B.dtype)
