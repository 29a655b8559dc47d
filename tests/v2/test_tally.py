"""Tokens of the text are told to the draft and counted by their source."""

from __future__ import annotations

import pytest

from tests.v2.following import DEPTH, EOS, Following, request, row
from vllm_ssd.target.v2.slots import Begun
from vllm_ssd.wire.packing import unpack_list


def test_tokens_of_the_text_are_told_and_counted_apart(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6])
    (verified,) = following.verify(row(7, [8], [9], ngram=[4, 3]))
    assert unpack_list(verified.proposed_counts) == [3]
    assert unpack_list(verified.tokens) == [8, 9, 4, 3]
    stats = following.stats
    assert (stats.hits, stats.depth_at_hit, stats.ngram_proposals) == (1, 1, 1)
    following.verify(row(7, [9, 4, 11], ngram=[5]))
    assert (stats.tokens_drafted, stats.tokens_accepted, stats.rejections) == (3, 2, 1)
    assert (stats.ngram_tokens, stats.ngram_accepted, stats.ngram_rejections) == (2, 1, 1)
    assert (stats.hits, stats.misses_no_branch) == (1, 1)
    assert stats.tokens_filled == DEPTH - 1


def test_nothing_of_the_text_is_told_from_a_token_on_that_ends_it(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6])
    (verified,) = following.verify(row(7, [8], ngram=[4, EOS, 3]))
    assert unpack_list(verified.tokens) == [8, 4]
    assert following.stats.tokens_filled == 2
    following.verify(row(7, [4, 9]))
    assert following.stats.ngram_tokens == following.stats.ngram_accepted == 1


def test_nothing_of_the_text_is_told_beyond_a_requests_length(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6], tokens=4)
    (verified,) = following.verify(row(7, [8], [9], ngram=[4, 3]))
    assert unpack_list(verified.tokens) == [8, 9, 4]


@pytest.mark.parametrize("alone", ["draft down", "left alone"])
def test_tokens_of_the_text_are_counted_without_the_draft(following: Following, alone: str) -> None:
    new = request([1, 5, 6])
    if alone == "left alone":
        new.lora_request = object()
    following.follower.scheduled([], [Begun(7, 2, new)])
    following.draft.dies()
    following.client.poll(1.0)
    following.follower.verified([row(7, [8], ngram=[4, 3], length=4)])
    following.follower.verified([row(7, [4, 9], length=6)])
    stats = following.stats
    assert (stats.ngram_tokens, stats.ngram_accepted, stats.tokens_accepted) == (2, 1, 1)
    following.follower.scheduled([7], [])
    assert not following.follower._tally._proposed
