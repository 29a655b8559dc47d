"""Short proposals filled up to the full depth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.target.proposer import _pad

token_lists = st.lists(st.integers(0, 99), max_size=4)


@given(st.lists(st.tuples(token_lists, token_lists), max_size=4))
def test_every_sampled_request_gets_a_full_proposal_that_starts_with_its_draft(
    rows: list[tuple[list[int], list[int]]],
) -> None:
    drafts = [draft for draft, _ in rows]
    sampled = [tokens for _, tokens in rows]
    padded = [list(draft) for draft in drafts]
    _pad(padded, sampled, depth=4)
    for before, after, tokens in zip(drafts, padded, sampled, strict=True):
        if tokens:
            assert len(after) == 4
            assert after[: len(before)] == before
            assert set(after[len(before) :]) <= {(before or tokens)[-1]}
        else:
            assert after == before


def test_a_miss_repeats_the_sampled_token_and_a_short_draft_its_own_last() -> None:
    proposals = [[], [7, 8], [1, 2, 3]]
    _pad(proposals, [[5], [6], [9]], depth=3)
    assert proposals == [[5, 5, 5], [7, 8, 8], [1, 2, 3]]
