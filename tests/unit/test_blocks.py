"""The gate and the assembly of blocks, against a token-by-token reference and an enumerated distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from skd_plugin.core import rng, sampling
from skd_plugin.core.gates import GATES
from skd_plugin.core.logit_rows import LogitRows, rank
from skd_plugin.core.proposals import Proposals
from skd_plugin.core.sampling import SamplingSettings, SettingRows
from skd_plugin.core.trace import NOTHING
from skd_plugin.core.verify import assemble_block

P_VALUE = 1e-4


def slow_rank(logits: list[float], token: int) -> int:
    return sorted(range(len(logits)), key=lambda v: (-logits[v], v)).index(token)


@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_teacher_rank_is_the_place_in_the_sorted_row(logits):
    """Small integers make many ties; ranks stay a permutation, so a top-K set has K members."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(logits), -1)
    ranks = rank(rows, torch.arange(len(logits))).tolist()
    assert ranks == [slow_rank(logits, token) for token in range(len(logits))]


def test_teacher_rank_of_equal_logits_follows_the_id():
    logits = torch.tensor([[2.0, 5.0, 5.0, 2.0]]).expand(4, -1)
    assert rank(logits, torch.arange(4)).tolist() == [2, 0, 1, 3]


def kept_by_top_k(logits_V: torch.Tensor, draft_N: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    """bool [N], at one prefix; each proposal has its own K."""
    count, nothing = len(draft_N), torch.zeros(len(draft_N), dtype=torch.int64)
    return GATES["top_k"].keep(
        Proposals(
            draft_N=draft_N,
            teacher=LogitRows.of(logits_V.expand(count, -1)),
            student=LogitRows.of(torch.zeros(count, len(logits_V))),
            position_N=nothing,
            seed_N=nothing,
            prompt_len_N=nothing,
            settings=SettingRows.of([SamplingSettings(k) for k in top_k], "cpu"),
        )
    )


FALLING = torch.arange(6, 0, -1).float()  # logits of tokens whose ranks are their ids


@pytest.mark.parametrize(("top_k", "kept"), [(0, 0), (1, 1), (3, 3), (6, 6), (2**31 - 1, 6)])
def test_gate_keeps_exactly_k_tokens(top_k, kept):
    gate = kept_by_top_k(FALLING, torch.arange(6), [top_k] * 6)
    assert gate.tolist() == [True] * kept + [False] * (6 - kept)


def test_gate_of_each_row_has_its_own_k():
    assert kept_by_top_k(FALLING, torch.tensor([2, 2, 2]), [2, 3, 0]).tolist() == [False, True, False]


def slow_block(draft: list[int], accepted: list[bool], replacement: list[int]) -> list[int]:
    """One request: emit until a token differs from its proposal."""
    emitted = []
    for proposal, keep, other in zip(draft, accepted, replacement, strict=True):
        emitted.append(proposal if keep else other)
        if emitted[-1] != proposal:
            break
    return emitted


@st.composite
def blocks(draw):
    """A ragged batch; two tokens only, so that a replacement often equals its proposal."""
    length = draw(st.integers(1, 5))
    token, keep = st.integers(0, 1), st.booleans()
    request = st.lists(st.tuples(token, keep, token), min_size=length, max_size=length)
    batch = draw(st.lists(st.tuples(request, st.integers(0, length)), min_size=1, max_size=5))
    return batch


@settings(max_examples=300, deadline=None)
@given(blocks())
def test_assemble_block_matches_the_reference(batch):
    draft, accepted, replacement = (
        torch.tensor([[place[i] for place in request] for request, _ in batch]) for i in range(3)
    )
    counts = [count for _, count in batch]
    block = assemble_block(draft, accepted.bool(), replacement, torch.tensor(counts))
    assert block.shape == draft.shape
    for row, (request, count) in zip(block.tolist(), batch, strict=True):
        expected = slow_block(*(list(column) for column in zip(*request[:count], strict=True))) if count else []
        assert row == expected + [NOTHING] * (len(request) - len(expected))
        assert (count == 0) == (not expected), "every request with a draft advances, none without"


def assemble_one(draft, accepted, replacement, count):
    arguments = [torch.tensor([x]) for x in (draft, accepted, replacement)]
    return assemble_block(*arguments, torch.tensor([count]))[0].tolist()


def test_replacement_equal_to_its_proposal_continues_the_block():
    assert assemble_one([4, 5, 6], [False, True, False], [4, 0, 9], 3) == [4, 5, 9]


def test_no_bonus_token_after_a_kept_block():
    """In the runner's wide form [B, L + 1] the last place stays empty, whatever stands in it."""
    assert assemble_one([4, 5, 7], [True, True, True], [8, 8, 8], 2) == [4, 5, NOTHING]


def distributions(top_k: int, vocab: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher's logits, p, q and m_K of one prefix, m_K by the formula."""
    generator = torch.Generator().manual_seed(top_k)
    teacher = torch.randn(vocab, generator=generator) * 1.5
    p, q = teacher.softmax(-1).double(), torch.randn(vocab, generator=generator).mul(1.5).softmax(-1).double()
    inside = torch.zeros(vocab, dtype=torch.bool)
    inside[sorted(range(vocab), key=lambda v: -teacher[v].item())[:top_k]] = True
    return teacher, p, q, inside * q + (1 - q[inside].sum()) * p


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 12])
def test_distribution_of_one_step_by_enumeration(top_k):
    """Sum over all (proposal, replacement) pairs of their probability gives m_K; K = V is q, K = 0 is p."""
    teacher, p, q, expected = distributions(top_k)
    vocab = len(p)
    draft, other = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab)).T
    keep = kept_by_top_k(teacher, draft, [top_k] * len(draft))
    emitted = assemble_block(draft[:, None], keep[:, None], other[:, None], torch.ones_like(draft))[:, 0]
    found = torch.zeros(vocab, dtype=torch.float64).index_add_(0, emitted, q[draft] * p[other])
    torch.testing.assert_close(found, expected)
    if top_k in (0, vocab):
        torch.testing.assert_close(found, p if top_k == 0 else q)


@pytest.mark.parametrize("top_k", [1, 4])
def test_distribution_of_one_step_by_sampling(top_k):
    """The same with the plugin's own random numbers and draws."""
    teacher, p, q, expected = distributions(top_k)
    count = 20_000
    seeds, positions = torch.arange(count), torch.full((count,), 5)
    draft = sampling.draw(q.expand(count, -1), rng.uniform(seeds, positions, rng.STUDENT))
    other = sampling.draw(p.expand(count, -1), rng.uniform(seeds, positions, rng.TEACHER))
    keep = kept_by_top_k(teacher, draft, [top_k] * count)
    emitted = assemble_block(draft[:, None], keep[:, None], other[:, None], torch.ones_like(draft))[:, 0]
    drawn = torch.bincount(emitted, minlength=len(p)).numpy()
    assert stats.chisquare(drawn, expected.numpy() / expected.sum().item() * count).pvalue > P_VALUE
