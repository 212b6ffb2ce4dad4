"""A checkpoint whose weights are rounded to eight bits, in compressed-tensors' format, which vLLM reads on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
SETTINGS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": EIGHT_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": EIGHT_BITS | {"strategy": "token", "dynamic": True},
        }
    },
}


def round_weights(full: Path, folder: Path) -> Path:
    """Each row of the linear layers to the nearest of 255 values; embedding and head stay full. Returns the folder."""
    shutil.copytree(full, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    state: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        state[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            state[name] = (weight.float() / scale).round().to(torch.int8)
            state[f"{name}_scale"] = scale
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
