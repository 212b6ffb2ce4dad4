"""Which prompts are answered by their reference, its tokens, and the drafts that they become."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skd_plugin.engine.references import MissingReference, follow, is_chosen, padded, reference_ids


class Letters:
    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(char) for char in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_choice_has_its_share() -> None:
    for share in (0.1, 0.5, 0.9):
        chosen = sum(is_chosen(share, 3, [1, i]) for i in range(2000)) / 2000
        assert abs(chosen - share) < 5 * (share * (1 - share) / 2000) ** 0.5


def test_choice_at_its_ends() -> None:
    assert not any(is_chosen(0.0, 3, [1, i]) for i in range(500))
    assert all(is_chosen(1.0, 3, [1, i]) for i in range(500))


def test_choice_depends_on_seed_and_prompt_alone() -> None:
    first = [is_chosen(0.5, 3, [1, i]) for i in range(100)]
    assert first == [is_chosen(0.5, 3, (1, i)) for i in range(100)]
    assert first != [is_chosen(0.5, 4, [1, i]) for i in range(100)]


def test_a_larger_share_keeps_the_prompts_of_a_smaller_one() -> None:
    assert all(is_chosen(0.7, 3, [i]) for i in range(300) if is_chosen(0.4, 3, [i]))


def test_tokens_end_in_the_end_token() -> None:
    assert reference_ids("ab", Letters(), [5]) == [97, 98, 2]


def test_every_token_of_one_end_event_is_the_first() -> None:
    assert reference_ids("ab", Letters(), [5], end_ids=(2, 98)) == [97, 2, 2]


@pytest.mark.parametrize("reference", [None, ""])
def test_missing_reference_names_the_prompt(reference: str | None) -> None:
    with pytest.raises(MissingReference, match=r"this one has none: 'tom has 3 coins'.*openrlhf\.data\.label_key"):
        reference_ids(reference, Letters(), [ord(char) for char in "tom has 3 coins"])


@given(
    forced=st.lists(st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=6)), min_size=1, max_size=6),
    data=st.data(),
)
def test_drafts_follow_the_reference_and_the_student_elsewhere(forced, data) -> None:
    ages = data.draw(st.lists(st.integers(-3, 9), min_size=len(forced), max_size=len(forced)))
    own = torch.arange(100, 100 + len(forced))
    followed = follow(padded(forced, torch.device("cpu")), torch.tensor(ages), own).tolist()
    for ids, age, token, drawn in zip(forced, ages, followed, own.tolist(), strict=True):
        inside = ids is not None and 0 <= age < len(ids)
        assert token == (ids[age] if inside else drawn)
