"""The look-up on the device is the core's walk, whatever is being written meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.v2.memory import Memory
from tests.v2.messages import (
    DEPTH,
    MAX_LENGTH,
    SLOTS,
    VOCAB_SIZE,
    Answer,
    RandomDraft,
    Texts,
    answers,
    draw_texts,
    expected,
    look_up_all,
)
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.v2.device_trees import DeviceTrees, pack_root
from vllm_ssd.target.v2.look_up import look_up
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.messages import MAX_ROWS

CPU = torch.device("cpu")
READS = 8
"""How often a look-up reads one of the arrays."""


class Setting:
    """A draft that has published something, the device's arrays and the core's trees."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.trees = DeviceTrees(SLOTS, DEPTH, VOCAB_SIZE, CPU)
        self.memory = Memory(self.trees)
        self.core = PublishedTrees(DEPTH, VOCAB_SIZE)
        self.draft = RandomDraft(data, self.core, TreeWriter(self.trees))
        if data.draw(st.booleans()):
            self.draft.publish_trees()
        for _ in range(data.draw(st.integers(0, 8))):
            self.draft.publish()

    def texts(self) -> Texts:
        return draw_texts(self.data, self.draft, self.core)


def check(answer: Answer, last: int) -> None:
    """What holds whatever was read."""
    assert all(0 <= token < VOCAB_SIZE for token in answer.drafts)
    assert 0 <= answer.drafted <= DEPTH
    assert answer.drafts[answer.drafted :] == [last] * (DEPTH - answer.drafted)


@settings(max_examples=400)
@given(data=st.data())
def test_it_finds_what_the_walk_of_the_core_finds(data: Any) -> None:
    setting = Setting(data)
    texts = setting.texts()
    found = answers(look_up_all(setting.trees, texts))
    assert found == expected(setting.core, setting.draft, texts)


@settings(max_examples=200)
@given(data=st.data())
def test_at_every_store_it_finds_what_was_or_what_will_be_or_nothing(data: Any) -> None:
    setting = Setting(data)
    texts = setting.texts()
    setting.memory.begin()
    setting.draft.publish()
    before, *_, after = states = [
        answers(look_up_all(seen, texts)) for seen in (*setting.memory.states(), setting.trees)
    ]
    for state in states:
        for answer, old, new, last in zip(state, before, after, texts.last[:, 0], strict=True):
            check(answer, int(last))
            n = answer.drafted
            # The token that ends a row is there before it is known to end it.
            end = new.ended and answer.found[:-1] == new.found
            assert end or answer.found in (old.found[:n], new.found[:n])


@given(data=st.data())
def test_reads_at_different_moments_find_tokens_of_the_vocabulary(data: Any) -> None:
    setting = Setting(data)
    texts = setting.texts()
    setting.memory.begin()
    for _ in range(data.draw(st.integers(1, 4))):
        setting.draft.publish()
    moments = st.integers(0, len(setting.memory) - 1)
    drawn = data.draw(st.lists(moments, min_size=READS, max_size=READS))
    for answer, last in zip(
        answers(look_up_all(setting.memory.seen(sorted(drawn)), texts)),
        texts.last[:, 0].tolist(),
        strict=True,
    ):
        check(answer, last)


@given(seed=st.integers(0, 2**32 - 1), ahead=st.integers(0, 3))
def test_no_content_of_the_arrays_breaks_it(seed: int, ahead: int) -> None:
    trees = DeviceTrees(SLOTS, DEPTH, VOCAB_SIZE, CPU)
    random = np.random.default_rng(seed)
    for array in (trees.host_roots, trees.host_forks, trees.host_tokens, trees.host_length):
        content = array.view(np.uint8)
        content[:] = random.integers(0, 256, content.shape, np.uint8)
    # One root is any bits; the text of the other request is on its trunk, wherever that is.
    length = int(random.integers(1, MAX_LENGTH))
    base, row = max(0, length - ahead), int(random.integers(0, MAX_ROWS))
    trees.host_roots[1] = pack_root(base, False, row)
    trees.host_length[row] = random.choice([*range(3 * trees.width), 2**31 - 1, -(2**31)])
    tokens = np.zeros((SLOTS, MAX_LENGTH), np.int32)
    tokens[1, base:length] = trees.host_tokens[row, : length - base]
    texts = Texts(torch.from_numpy(tokens), torch.full([SLOTS], length), torch.ones(SLOTS).int())
    slots = torch.arange(SLOTS)
    last = torch.zeros(SLOTS, 1, dtype=torch.int64)
    found = look_up(trees, texts.tokens, texts.lengths, last, slots, texts.num_sampled)
    for answer in answers(found):
        check(answer, 0)


@pytest.mark.parametrize("requests", [1, 32])
def test_nothing_in_it_depends_on_values_on_the_host(requests: int) -> None:
    """Fake tensors have no values: what needs one, a copy to the host say, raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        trees = object.__new__(DeviceTrees)
        trees.depth, trees.width, trees.vocab_size = DEPTH, 2 * DEPTH + 2, VOCAB_SIZE
        trees.sources = None
        trees.roots = torch.zeros(requests, dtype=torch.int64)
        trees.forks = torch.zeros(16, dtype=torch.int64)
        trees.tokens = torch.zeros(16, trees.width, dtype=torch.int32)
        trees.length = torch.zeros(16, dtype=torch.int32)
        trees.ended = torch.zeros(16, dtype=torch.bool)
        trees.counting = torch.arange(2 * trees.width)
        found = look_up(
            trees,
            torch.zeros(requests, MAX_LENGTH, dtype=torch.int32),
            torch.zeros(requests, dtype=torch.int32),
            torch.zeros(requests, 1, dtype=torch.int64),
            torch.zeros(requests, dtype=torch.int64),
            torch.zeros(requests, dtype=torch.int32),
        )
    assert (found.drafts.shape, found.drafts.dtype) == ((requests, DEPTH), torch.int64)
    for part in found[1:]:
        assert (part.shape, part.dtype) == ((requests,), torch.int32)
