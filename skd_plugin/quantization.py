"""Models whose weights are rounded: how, and how many bits each takes. They cannot be trained: teachers alone."""

from __future__ import annotations

from typing import Any

# vLLM's names of roundings that it makes of full weights while it loads them (skd.vllm.quantization): bits a weight,
# with its share of the scales.
WHILE_LOADING: dict[str, float] = {
    "fp8": 8,
    "fp8_per_tensor": 8,
    "fp8_per_channel": 8,
    "fp8_per_block": 8,
    "mxfp8": 8 + 8 / 32,
    "nvfp4_per_token": 4 + 8 / 16,
}
# Names of formats of files that say no number themselves.
OF_FILES: dict[str, float] = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4 + 8 / 32}
SCALE_BITS = 16


def method_of(config: Any) -> str | None:
    """The name of the rounding in a checkpoint's configuration; None where its weights are full."""
    settings = _settings(config)
    return str(settings.get("quant_method", "unknown")) if settings else None


def bits_of(config: Any) -> float | None:
    """Bits a weight of a checkpoint with rounded weights, with its share of the scales; None where they are full, or
    where the configuration does not say.
    """
    settings = _settings(config)
    groups = (settings.get("config_groups") or {}).values()  # of compressed-tensors
    weights = [group["weights"] for group in groups if group.get("weights")]
    sizes = [_with_scales(each.get("num_bits"), each.get("group_size")) for each in weights]
    sizes.append(_with_scales(settings.get("bits", settings.get("w_bit")), settings.get("group_size")))  # GPTQ, AWQ
    return max(filter(None, sizes), default=OF_FILES.get(str(settings.get("quant_method"))))


def _settings(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def _with_scales(bits: float | None, group_size: int | None) -> float | None:
    if not bits:
        return None
    return bits + (SCALE_BITS / group_size if group_size and group_size > 0 else 0)
