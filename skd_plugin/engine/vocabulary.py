"""Two models of one vocabulary whose output layers have different numbers of padding rows.

Qwen2.5 0.5B has 151,936 rows and 7B 152,064 for the same 151,665 tokens. Both distributions are restricted to the ids
that both models have: a padding row beyond them counts as a logit of minus infinity.
"""

from __future__ import annotations

from typing import Any

from vllm.config import SpeculativeConfig, VllmConfig

VLLM_CHECK = "verify_equal_vocab_size_if_draft_model"  # of SpeculativeConfig; asked when it is made and by the drafter

vllm_check = getattr(SpeculativeConfig, VLLM_CHECK, None)


def allow_padding() -> None:
    """Takes vLLM's check of equal sizes away, in this process. Its own rejection sampler needs it; SKD's does not.

    Whether the tokens of the two models agree is checked before, from their tokenizers (prepare/model_checks.py).

    Raises:
        RuntimeError: vLLM has no such check any more, so that nothing is known of what it does with two sizes.
    """
    if vllm_check is None:
        raise RuntimeError(f"vLLM's SpeculativeConfig has no {VLLM_CHECK}; run pytest tests/contract")
    setattr(SpeculativeConfig, VLLM_CHECK, _equal_or_padded)


def _equal_or_padded(config: Any) -> None:
    """In place of vLLM's check."""


def sizes(vllm_config: VllmConfig) -> dict[str, int]:
    """Rows of the teacher's and of the student's output layer, and the ids that both have."""
    speculative = vllm_config.speculative_config
    teacher = vllm_config.model_config.get_vocab_size()
    student = speculative.draft_model_config.get_vocab_size()
    return {"vocab_size": min(teacher, student), "teacher_vocab_size": teacher, "student_vocab_size": student}
