"""Which programs read the models' logits: torch's operators, or kernels of Triton (engine/triton_rows.py)."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec

import torch

from skd_plugin.core.logit_rows import LogitRows, Seen, Wanted
from skd_plugin.core.sampling import SamplingSettings, SettingRows

ROWS = 4  # of each model on which they are compared
MOST_APART = 1e-3  # nats; their sums are of float32, in another order
DRAWS = (  # settings with which each row is drawn from
    SamplingSettings(0),
    SamplingSettings(0, student_temperature=0.7, student_top_p=0.5),
    SamplingSettings(0, student_temperature=0.0, student_top_p=0.5),
)


def rows_of(
    kernels: str, device: torch.device, dtype: torch.dtype, vocab_size: int, wanted: Wanted
) -> type[LogitRows]:
    """How an engine reads its logits. Triton's kernels are compiled and compared with torch here, at the start.

    Args:
        kernels: `skd.rollout.kernels`.
        device: the engine's.
        dtype: of the logits.
        vocab_size: entries of a row.
        wanted: by the engine's recorder.

    Raises:
        RuntimeError: Triton is asked for and not installed, cannot compile its kernels, or finds something else.
    """
    installed = find_spec("triton") is not None
    if kernels == "torch" or (kernels == "auto" and (device.type == "cpu" or not installed)):
        return LogitRows
    if not installed:
        raise RuntimeError("skd.rollout.kernels is triton, which is not installed; install it, or use kernels: auto")
    from triton.errors import TritonError

    from skd_plugin.engine.triton_rows import TritonRows

    try:
        apart = _apart(TritonRows, device, dtype, vocab_size, wanted)
    except TritonError as error:
        raise RuntimeError(
            f"Triton cannot compile or run the sampler's kernels on {device}: {error}. Use skd.rollout.kernels: "
            "torch, which takes longer and finds the same"
        ) from error
    too_far = {name: value for name, value in apart.items() if not value <= MOST_APART}
    if too_far:
        name, value = max(too_far.items(), key=lambda item: item[1])
        raise RuntimeError(
            f"on random logits Triton's kernels and torch's operators differ by {value:.2g} in {name}, of at most "
            f"{MOST_APART:g}: one of them is wrong on {device}. Use skd.rollout.kernels: torch, and report it"
        )
    return TritonRows


def _apart(
    rows: type[LogitRows], device: torch.device, dtype: torch.dtype, vocab_size: int, wanted: Wanted
) -> dict[str, float]:
    """How far both are apart in each figure, on logits of float32 and then on the engine's own."""
    generator = torch.Generator().manual_seed(0)
    teacher_NV, student_NV = (torch.randn(ROWS, vocab_size, generator=generator).mul_(4).to(device) for _ in range(2))
    token_N = torch.randint(vocab_size, (ROWS,), generator=generator).to(device)
    uniform_N = torch.rand(ROWS, generator=generator, dtype=torch.float64).to(device)
    apart = defaultdict[str, list[float]](list)
    for kind in dict.fromkeys([torch.float32, dtype]):
        given = teacher_NV.to(kind), student_NV.to(kind), token_N, wanted
        for name, one, other in zip(Seen._fields, _figures(LogitRows, *given), _figures(rows, *given), strict=True):
            # Where many entries are as high as each other the student's last may be others, and so what is left, too.
            if name != "rest_N1" or kind == torch.float32:
                apart[name].append((one.double() - other.double()).abs().max().item())
        ranks_N = [some.of(given[0]).rank(token_N) for some in (LogitRows, rows)]
        apart["rank"].append((ranks_N[0] - ranks_N[1]).abs().max().item())
        for settings in DRAWS:
            own, uniform_N = SettingRows.of([settings] * ROWS, device), uniform_N.flip(0)
            found, probs_NV = rows.of(given[0]), LogitRows.of(given[0]).warp(own, "student")
            apart["sample"].append(off(found.sample(own, "student", uniform_N), probs_NV, uniform_N))
            apart["warp"].append((found.warp(own, "student") - probs_NV).abs().max().item())
    # Python's max would leave out what is no number.
    return {name: torch.tensor(values).max().item() for name, values in apart.items()}


def off(token_N: torch.Tensor, probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> float:
    """How far the numbers that tokens were drawn with are, at most, from those that draw them in float64; infinite for
    a token of no probability.
    """
    probs_NV, token_N1, uniform_N1 = probs_NV.double(), token_N[:, None], uniform_N[:, None]
    own_N1, up_to_N1 = probs_NV.gather(1, token_N1), probs_NV.cumsum(-1).gather(1, token_N1)
    off_N1 = (uniform_N1 - up_to_N1).clamp_min(up_to_N1 - own_N1 - uniform_N1).clamp_min(0.0)
    return off_N1.where(own_N1 > 0, torch.inf).max().item()


def _figures(
    rows: type[LogitRows], teacher_NV: torch.Tensor, student_NV: torch.Tensor, token_N: torch.Tensor, wanted: Wanted
) -> Seen:
    """What is the same whichever of equal entries comes first: their logits in place of ids."""
    seen = rows.of(teacher_NV).look(rows.of(student_NV), token_N, wanted)
    return seen._replace(
        rest_N1=seen.rest_N1.exp(),  # 0 where a small vocabulary is named as a whole
        teacher_ids_NK=teacher_NV.gather(1, seen.teacher_ids_NK),
        student_ids_NC=student_NV.gather(1, seen.student_ids_NC),
        teacher_own_NC=seen.teacher_own_NC - teacher_NV.gather(1, seen.student_ids_NC).float(),
    )
