"""What drafts were sampled from reaches vLLM's sampler, on all ranks, while a request samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.v2.sampled_from import (
    AHEAD,
    CPU,
    DEPTH,
    MOST,
    SLOTS,
    VOCAB_SIZE,
    Q,
    put,
    sources,
)
from vllm_ssd.target.v2.device_sources import Sampled, certain
from vllm_ssd.target.v2.draft_logits import DraftLogits
from vllm_ssd.target.v2.sampled_drafts import SampledDrafts

DISTRIBUTIONS = st.dictionaries(
    st.integers(0, VOCAB_SIZE - 1), st.integers(1, 50), min_size=1, max_size=MOST
)
BATCHES = st.lists(
    st.dictionaries(
        st.integers(0, SLOTS - 1),
        st.lists(DISTRIBUTIONS, min_size=DEPTH, max_size=DEPTH),
        min_size=1,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50)
@given(batches=BATCHES)
def test_the_logits_are_those_of_the_last_proposal_of_each_slot(batches: Any) -> None:
    rows = DraftLogits(SLOTS, DEPTH, VOCAB_SIZE, MOST, CPU)
    temperature = torch.tensor([0.3, 0.7, 1.0, 1.7])
    expected = torch.zeros(SLOTS, DEPTH, VOCAB_SIZE)
    expected[:, :, 0] = 1.0
    for batch in batches:
        tokens = torch.zeros(len(batch), DEPTH, MOST, dtype=torch.int64)
        logs = torch.zeros(len(batch), DEPTH, MOST)
        for at, (slot, columns) in enumerate(batch.items()):
            expected[slot] = 0.0
            for column, weights in enumerate(columns):
                q = torch.tensor(list(weights.values())) / sum(weights.values())
                expected[slot, column, list(weights)] = q
                # Places left over repeat the first one.
                repeated = [*range(len(weights)), *[0] * (MOST - len(weights))]
                tokens[at, column] = torch.tensor(list(weights))[repeated]
                logs[at, column] = q[repeated].log()
        slots = torch.tensor(list(batch))
        rows.write(slots, Sampled(tokens, logs, torch.zeros(len(batch))), temperature)
    found = (rows.logits / temperature[:, None, None]).softmax(-1)
    torch.testing.assert_close(found, expected)


def a_request(req_id: str, temperature: float) -> Any:
    params = SimpleNamespace(temperature=temperature)
    return SimpleNamespace(req_id=req_id, sampling_params=params)


def a_step(*new: Any, gone: tuple[str, ...] = (), preempted: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=list(new), finished_req_ids=set(gone), preempted_req_ids=set(preempted)
    )


@pytest.fixture
def drafts() -> SampledDrafts:
    """Slots that proposed something before."""
    rows = DraftLogits(SLOTS, DEPTH, VOCAB_SIZE, MOST, CPU)
    proposed = torch.full((SLOTS, DEPTH), 7)
    rows.write(torch.arange(SLOTS), certain(proposed, MOST), torch.ones(SLOTS))
    states = SimpleNamespace(device=CPU, draft_tokens=torch.zeros(SLOTS, DEPTH, dtype=torch.int64))
    return SampledDrafts(rows, states)


def test_a_slot_begins_with_what_vllm_puts_there(drafts: SampledDrafts) -> None:
    drafts._req_states.draft_tokens[2] = torch.tensor([3, 0, -1])
    drafts.scheduled(a_step(a_request("a", 0.7)), {"a": 2})
    assert drafts.logits[2].softmax(-1).argmax(-1).tolist() == [3, 0, 0]
    assert (drafts.logits[2] > -torch.inf).sum() == DEPTH
    assert drafts.logits[1].argmax(-1).tolist() == [7, 7, 7]


def test_it_is_wanted_while_a_request_samples(drafts: SampledDrafts) -> None:
    drafts.scheduled(a_step(a_request("a", 0.0)), {"a": 0})
    assert not drafts.wanted
    drafts.scheduled(a_step(a_request("b", 0.7), a_request("c", 1.0)), {"b": 1, "c": 2})
    drafts.scheduled(a_step(gone=("b",)), {})
    assert drafts.wanted
    drafts.scheduled(a_step(preempted=("c",)), {})
    assert not drafts.wanted


def test_without_what_they_were_sampled_from_drafts_are_certain(drafts: SampledDrafts) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    drafts.hand_over(torch.tensor([3]), tokens, None, torch.ones(SLOTS))
    assert drafts.logits[3].softmax(-1).max(-1).indices.tolist() == [1, 2, 3]
    assert (drafts.logits[3] > -torch.inf).sum() == DEPTH


class Ranks:
    """Tensor-parallel ranks: the first one's tensors reach the second."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        assert src == 0
        self.sent.append(tensor)
        return tensor


class Receiving:
    def __init__(self, sent: list[torch.Tensor]) -> None:
        self.sent = sent

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        first = self.sent.pop(0)
        assert (first.shape, first.dtype) == (tensor.shape, tensor.dtype)
        return tensor.copy_(first)


def test_all_ranks_have_the_same(drafts: SampledDrafts) -> None:
    ranks = Ranks()
    held = sources()
    put(held, 5, Q)
    tokens = torch.tensor([[5, 1, 1]])
    one, first, drafted = torch.tensor([6]), torch.tensor([20]), torch.tensor([3])
    sampled = held.read(one, held.lives(one), first, tokens, drafted, AHEAD)
    logits = []
    for group, known in ((ranks, sampled), (Receiving(ranks.sent), None)):
        rank = SampledDrafts(
            DraftLogits(SLOTS, DEPTH, VOCAB_SIZE, MOST, CPU), drafts._req_states, group
        )
        rank.hand_over(torch.tensor([3]), tokens, known, torch.ones(SLOTS))
        logits.append(rank.logits)
    assert torch.equal(*logits)
    assert logits[0][3, 0].exp()[list(Q)].tolist() == pytest.approx(list(Q.values()))


@pytest.mark.parametrize("requests", [1, 32])
def test_nothing_in_it_depends_on_values_on_the_host(requests: int) -> None:
    """Fake tensors have no values: what needs one, a copy to the host say, raises."""
    held = sources()
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.zeros(requests, dtype=torch.int32)
        drafts = torch.zeros(requests, DEPTH, dtype=torch.int64)
        sampled = held.read(rows, rows, rows, drafts, rows, torch.arange(DEPTH))
        logits = DraftLogits(requests, DEPTH, VOCAB_SIZE, MOST, CPU)
        logits.write(torch.arange(requests), sampled, torch.zeros(requests))
    assert sampled.tokens.shape == sampled.logs.shape == (requests, DEPTH, MOST)
    assert (sampled.tokens.dtype, sampled.count.dtype) == (torch.int64, torch.int32)
