"""The random numbers are uniform, independent between counters, and never change."""

import pytest
import torch
from scipy import stats

from skd_plugin.core import rng

P_VALUE = 1e-4
COUNT = 20_000


def by_position(seed: int, stream: int, count: int = COUNT) -> torch.Tensor:
    return rng.uniform(torch.full((count,), seed), torch.arange(count), stream)


def by_seed(position: int, stream: int, count: int = COUNT) -> torch.Tensor:
    return rng.uniform(torch.arange(count), torch.full((count,), position), stream)


SERIES = {
    "positions": by_position(0, rng.STUDENT),
    "positions, negative seed": by_position(-(1 << 63), rng.TEACHER),
    "seeds": by_seed(0, rng.STUDENT),
    "seeds, far position": by_seed(100_000, rng.TEACHER),
    "derived seeds": rng.uniform(
        torch.tensor([rng.derive_seed(7, i) for i in range(2000)]), torch.full((2000,), 3), rng.STUDENT
    ),
}


@pytest.mark.parametrize("name", SERIES)
def test_uniform(name):
    values = SERIES[name].numpy()
    counts, _ = torch.histogram(SERIES[name].float(), bins=50, range=(0.0, 1.0))
    assert stats.kstest(values, "uniform").pvalue > P_VALUE
    assert stats.chisquare(counts.numpy()).pvalue > P_VALUE


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (by_position(5, rng.STUDENT), by_position(5, rng.TEACHER)),
        (by_position(5, rng.STUDENT)[:-1], by_position(5, rng.STUDENT)[1:]),
        (by_position(5, rng.STUDENT)[:-1], by_position(5, rng.TEACHER)[1:]),
        (by_position(5, rng.STUDENT), by_position(6, rng.STUDENT)),
        (by_seed(9, rng.STUDENT)[:-1], by_seed(9, rng.STUDENT)[1:]),
        (by_seed(9, rng.STUDENT)[:-1], by_seed(10, rng.STUDENT)[1:]),
    ],
    ids=["streams", "next position", "next position, other stream", "next seed", "seeds", "diagonal"],
)
def test_independent(left, right):
    """The pairs fill the unit square evenly."""
    cells = (left * 10).long() * 10 + (right * 10).long()
    assert stats.chisquare(torch.bincount(cells, minlength=100).numpy()).pvalue > P_VALUE


def test_pinned_values():
    """A recorded trace can be sampled again by a later version only if these never change."""
    seeds, positions = torch.tensor([0, 1, -1, 1 << 62]), torch.tensor([0, 1, 511, 100_000])
    student = [SplitMix(s).uniform(p, 0) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    teacher = [SplitMix(s).uniform(p, 1) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert rng.uniform(seeds, positions, rng.STUDENT).tolist() == student
    assert rng.uniform(seeds, positions, rng.TEACHER).tolist() == teacher
    assert rng.uniform(seeds, positions, rng.STUDENT).tolist() == PINNED


def test_splitmix64_reference_value():
    """First output of SplitMix64 with state 0, as published with the algorithm."""
    assert SplitMix(0).mix(SplitMix.GOLDEN) == 0xE220A8397B1DCDAF
    assert rng.uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1), rng.STUDENT).item() == (
        (0xE220A8397B1DCDAF >> 11) + 0.5
    ) * (2.0**-53)


def test_open_interval_and_dtype():
    values = torch.cat([series for series in SERIES.values()])
    assert values.dtype == torch.float64
    assert values.min() > 0 and values.max() < 1


def test_a_row_does_not_depend_on_its_batch():
    seeds, positions = torch.arange(50) * 977, torch.arange(50) % 7
    together = rng.uniform(seeds, positions.to(torch.int32), rng.TEACHER)
    alone = torch.cat([rng.uniform(seeds[i : i + 1], positions[i : i + 1], rng.TEACHER) for i in range(50)])
    assert torch.equal(together, alone)


def test_derive_seed():
    seeds = [rng.derive_seed(a, b) for a in range(60) for b in range(60)]
    assert len(set(seeds)) == len(seeds), "order and value of every part count"
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)
    assert rng.derive_seed(1, 2) == rng.derive_seed(1, 2) != rng.derive_seed(1, 2, 0)
    assert rng.derive_seed(1 << 64) == rng.derive_seed(0), "parts count modulo 2^64"
    for first, second in ((7, 3), (-5, 1 << 63), (0, -1)):
        mixer = SplitMix(0)
        state = mixer.mix((mixer.GOLDEN + first) & mixer.MASK)
        state = mixer.mix((state + mixer.GOLDEN + second) & mixer.MASK)
        assert rng.derive_seed(first, second) % (1 << 64) == state


class SplitMix:
    """SplitMix64 on Python's integers, independent of torch."""

    GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def __init__(self, seed: int) -> None:
        self.state = self.mix(seed & self.MASK)

    def mix(self, x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & self.MASK
        return x ^ (x >> 31)

    def uniform(self, position: int, stream: int) -> float:
        bits = self.mix((self.state + (4 * position + stream + 1) * self.GOLDEN) & self.MASK) >> 11
        return (bits + 0.5) * 2.0**-53


PINNED = [0.8833108082136427, 0.20205969594076628, 0.66961068259739, 0.7604634950281639]


def test_no_two_draws_of_a_sequence_share_a_number():
    streams = (rng.STUDENT, rng.TEACHER, rng.COIN)
    values = torch.cat([by_position(5, stream) for stream in streams])
    assert len(values.unique()) == len(values) == len(streams) * COUNT
