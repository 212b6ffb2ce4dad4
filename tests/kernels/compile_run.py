"""Compiles the kernels for GPUs that need not be here, as a launch there would; prints the sizes of what came out.

PYTHONPATH=.venv/triton python -m tests.kernels.compile_run
"""

from __future__ import annotations

import json
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skd_plugin.engine import triton_kernels as kernels

CARDS = {"A100": 80, "H100": 90}  # name -> compute capability
LOGITS = ("bf16", "fp16", "fp32")
BITS = {"bf16": 16, "fp16": 20, "fp32": 32}  # that an order of logits has
# Of the arguments by their name; all others are pointers to float32.
TYPES = {name: "*i64" for name in "rows teacher_rows student_rows ends student_ends token".split()}
TYPES |= {name: "i32" for name in "stride teacher_stride student_stride size pieces count".split()}
TYPES |= dict.fromkeys(("rank", "ties", "edges", "keeps"), "*i32")
TYPES |= {"inverse_temperature": "fp32", "uniform": "*fp64"}


def size_of(kernel: Any, logits: str, capability: int, **constants: Any) -> int:
    """Bytes of machine code. Where a vocabulary is a multiple of 16, so is where each row begins."""
    types = TYPES | dict.fromkeys(("values", "teacher", "student"), f"*{logits}")
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name == "size" or "stride" in name]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": kernels.WARPS}
    return len(compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"])


def main() -> None:
    sizes = {}
    for card, capability in CARDS.items():
        for logits in LOGITS:
            sizes[f"rank, {logits}, {card}"] = size_of(kernels.rank_kernel, logits, capability, ENDS=2)
            for tempered, length in ((False, 64), (True, 32)):
                constants = {"ENDS": 2, "STUDENT_ENDS": 0, "LENGTH": length, "TEMPERED": tempered}
                constants["PIECES"] = kernels.ENTRIES.value // length
                name = f"look, {logits}, {card}, {length} entries a piece"
                sizes[name] = size_of(kernels.look_kernel, logits, capability, **constants)
            pieces = {"ENDS": 2, "LENGTH": 512, "PIECES": 2}
            sizes[f"pieces, {logits}, {card}"] = size_of(kernels.pieces_kernel, logits, capability, **pieces)
            for ends, bits in ((2, 32), (0, BITS[logits])):
                whole = {"ENDS": ends, "LENGTH": 512, "ALL": 512, "BITS": bits}
                name = f"nucleus, {logits}, {card}, {ends} end tokens"
                sizes[name] = size_of(kernels.nucleus_kernel, logits, capability, **whole, PIECES=2)
                name = f"draw, {logits}, {card}, {ends} end tokens"
                sizes[name] = size_of(kernels.draw_kernel, logits, capability, **whole, NUCLEUS=ends > 0)
                whole |= {"PIECES": 2, "NUCLEUS": ends == 0}
                name = f"warp, {logits}, {card}, {ends} end tokens"
                sizes[name] = size_of(kernels.warp_kernel, logits, capability, **whole)
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
