"""Two models of one vocabulary whose output layers have different numbers of padding rows.

Qwen2.5 0.5B has 151,936 rows and 7B 152,064 for the same 151,665 tokens. Both distributions are restricted to the ids
that both models have: a padding row beyond them counts as a logit of minus infinity.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.config import SpeculativeConfig, VllmConfig

from skd_plugin.seams import rebind

VLLM_CHECK = "verify_equal_vocab_size_if_draft_model"  # of SpeculativeConfig; asked when it is made and by the drafter
vllm_check = getattr(SpeculativeConfig, VLLM_CHECK, None)  # as it was before `allow_padding`


def allow_padding() -> None:
    """Takes vLLM's check of equal sizes away, in this process. Its own rejection sampler needs it; SKD's does not.

    Whether the tokens of the two models agree is checked before, from their tokenizers (prepare/model_checks.py).

    Raises:
        RuntimeError: vLLM has no such check any more, so that nothing is known of what it does with two sizes.
    """
    rebind(SpeculativeConfig, VLLM_CHECK, _equal_or_padded, needed_by="the padding of two vocabularies")


def _equal_or_padded(config: Any) -> None:
    """In place of vLLM's check."""


class Sizes(NamedTuple):
    """Rows of output layers."""

    teacher: int
    student: int

    @property
    def common(self) -> int:
        """Ids that both have."""
        return min(self)


def sizes(vllm_config: VllmConfig) -> Sizes:
    speculative = vllm_config.speculative_config
    return Sizes(vllm_config.model_config.get_vocab_size(), speculative.draft_model_config.get_vocab_size())
