"""What of a LoRA adapter is left when W + s B A is rounded to bfloat16 for the engine; docs/lora.md has the result.

W is normal, A as peft makes it at first, and every number of B has moved by the learning rate in each of so many steps
of Adam in one direction, which is the most that it can.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from skd_plugin.adapters import Adapter, Weight


def kept(weight: Weight) -> tuple[float, float]:
    """Of the adapter's change D of the weight, of which the engine sees R: (R . D) / (D . D), and |R - D| / |D|."""
    assert weight.adapter is not None
    wanted = weight.adapter.delta().double()
    found = weight.merged().double() - weight.base.double()
    share = (found * wanted).sum() / wanted.square().sum()
    return share.item(), ((found - wanted).norm() / wanted.norm()).item()


def after(moved: float, *, size: int, rank: int, alpha: int, std: float) -> Weight:
    """A weight whose B has moved by `moved` in each place, up or down."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, size, generator=generator).mul(std).to(torch.bfloat16)
    a = torch.empty(rank, size).uniform_(-(size**-0.5), size**-0.5, generator=generator)
    b = moved * torch.randn(size, rank, generator=generator).sign()
    return Weight(torch.nn.Parameter(base), Adapter(*map(torch.nn.Parameter, (a, b)), alpha / rank, transposed=False))


def table(rates: Sequence[float], steps: Sequence[int], **shape: float) -> list[str]:
    """Lines of markdown."""
    lines = ["| learning rate | " + " | ".join(f"{n:,} steps" for n in steps) + " |", "|---" * (len(steps) + 1) + "|"]
    for rate in rates:
        found = [kept(after(rate * n, **shape)) for n in steps]
        cells = [f"{share:.1%} (error {error:.0%})" for share, error in found]
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--std", type=float, default=0.02, help="of W")
    given = parser.parse_args()
    print("\n".join(table([1e-5, 1e-4, 1e-3], [1, 10, 100, 1000], **vars(given))))


if __name__ == "__main__":
    main()
