"""On the device the text prolongs proposals as V1's n-grams do on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_ssd.core.ngram import continuation
from vllm_ssd.target import ngram
from vllm_ssd.target.v2 import ngram as device_ngram
from vllm_ssd.target.v2.look_up import Found
from vllm_ssd.target.v2.ngram import Ngrams

DEPTH, MAX_LENGTH, VOCAB_SIZE, SLOTS = 4, 40, 5, 3
CPU = torch.device("cpu")
TOKENS = st.integers(0, VOCAB_SIZE - 1)


class Request:
    """A slot with a text, and what the draft has found to follow it."""

    def __init__(self, text: list[int], drafted: list[int], ended: bool, sampled: int) -> None:
        self.text, self.drafted, self.ended, self.sampled = text, drafted, ended, sampled

    def expected(self, window: int) -> tuple[list[int], int]:
        """Its proposal, and how many tokens of it are from the text, as V1 has it."""
        text = np.array([*self.text[-window:], *self.drafted], np.int32)
        more: list[int] = []
        if self.sampled and not self.ended and len(self.drafted) < DEPTH:
            more = continuation(text, DEPTH - len(self.drafted))
        tokens = self.drafted + more
        return tokens + [self.text[-1]] * (DEPTH - len(tokens)), len(more)


REQUESTS = st.builds(
    Request,
    st.lists(TOKENS, min_size=1, max_size=MAX_LENGTH),
    st.lists(TOKENS, max_size=DEPTH),
    st.sampled_from([False, False, False, True]),
    st.integers(0, DEPTH + 1),
)


def prolong(requests: list[Request]) -> list[tuple[list[int], int]]:
    """What the device proposes, last slot first; the text behind each length is garbage."""
    texts = torch.randint(0, VOCAB_SIZE, (len(requests), MAX_LENGTH), dtype=torch.int32)
    for slot, each in enumerate(requests):
        texts[slot, : len(each.text)] = torch.tensor(each.text)
    slots = torch.arange(len(requests)).flip(0)
    rows = requests[::-1]
    found = Found(
        torch.tensor([(r.drafted + [r.text[-1]] * DEPTH)[:DEPTH] for r in rows]),
        torch.tensor([len(r.drafted) for r in rows], dtype=torch.int32),
        torch.tensor([r.ended for r in rows], dtype=torch.int32),
        *[torch.zeros(len(rows), dtype=torch.int32)] * 3,
    )
    lengths = torch.tensor([len(r.text) for r in requests], dtype=torch.int32)
    sampled = torch.tensor([r.sampled for r in rows], dtype=torch.int32)
    ngrams = Ngrams(DEPTH, VOCAB_SIZE, MAX_LENGTH, CPU)
    prolonged, matched = ngrams.prolong(found, texts, lengths, slots, sampled)
    assert prolonged.drafts.dtype == torch.int64
    assert matched.dtype == torch.int32
    return list(zip(prolonged.drafts.tolist(), matched.tolist(), strict=True))[::-1]


@settings(max_examples=200)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=SLOTS))
def test_it_finds_what_v1_finds(requests: list[Request]) -> None:
    assert prolong(requests) == [each.expected(ngram.WINDOW) for each in requests]


@pytest.mark.parametrize("window", [1, 3, 7])
@given(requests=st.lists(REQUESTS, min_size=2, max_size=2))
def test_only_the_end_of_a_long_text_is_searched(window: int, requests: list[Request]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_ngram, "TOTAL", 2 * window)
        assert prolong(requests) == [each.expected(window) for each in requests]


def test_a_repeated_text_is_proposed_behind_what_was_found() -> None:
    request = Request([1, 2, 3, 4, 0, 1, 2], [3], ended=False, sampled=1)
    assert prolong([request]) == [([3, 4, 0, 1], 3)]


@given(seed=st.integers(0, 2**32 - 1))
def test_no_content_of_the_texts_breaks_it(seed: int) -> None:
    """Lengths and tokens of slots that are given away meanwhile are anything."""
    random = np.random.default_rng(seed)

    def anything(*shape: int) -> Any:
        return torch.from_numpy(random.integers(-(2**31), 2**31, shape).astype(np.int32))

    found = Found(
        torch.zeros(SLOTS, DEPTH, dtype=torch.int64),
        torch.from_numpy(random.integers(0, DEPTH + 1, SLOTS).astype(np.int32)),
        *[torch.zeros(SLOTS, dtype=torch.int32)] * 4,
    )
    ngrams = Ngrams(DEPTH, VOCAB_SIZE, MAX_LENGTH, CPU)
    prolonged, matched = ngrams.prolong(
        found, anything(SLOTS, MAX_LENGTH), anything(SLOTS), torch.arange(SLOTS), torch.ones(SLOTS)
    )
    assert 0 <= prolonged.drafts.min() <= prolonged.drafts.max() < VOCAB_SIZE
    assert (matched >= 0).all()
    assert (found.drafted + matched <= DEPTH).all()


@pytest.mark.parametrize("requests", [1, 32])
def test_nothing_in_it_depends_on_values_on_the_host(requests: int) -> None:
    """Fake tensors have no values: what needs one, a copy to the host say, raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        counts = torch.zeros(requests, dtype=torch.int32)
        found = Found(torch.zeros(requests, DEPTH, dtype=torch.int64), *[counts] * 5)
        prolonged, matched = Ngrams(DEPTH, VOCAB_SIZE, MAX_LENGTH, CPU).prolong(
            found,
            torch.zeros(requests, MAX_LENGTH, dtype=torch.int32),
            counts,
            torch.zeros(requests, dtype=torch.int64),
            counts,
        )
    assert (prolonged.drafts.shape, prolonged.drafts.dtype) == ((requests, DEPTH), torch.int64)
    assert (matched.shape, matched.dtype) == ((requests,), torch.int32)
