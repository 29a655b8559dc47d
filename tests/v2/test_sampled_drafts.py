"""What drafts were sampled from reaches vLLM's sampler as it was, or not at all."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_ssd.target.v2.device_sources import DeviceSources, Sampled, certain
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.draft_logits import DraftLogits
from vllm_ssd.target.v2.sampled_drafts import SampledDrafts
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.messages import MAX_ROWS, Planted, Ready, Stepped
from vllm_ssd.wire.packing import pack, pack_floats

DEPTH, MOST, VOCAB_SIZE, SLOTS, WIDTH = 3, 4, 16, 4, 8
CPU = torch.device("cpu")
AHEAD = torch.arange(DEPTH)
ARRAYS = ("_tokens", "_probabilities", "_support", "_sum", "_lives")
"""In the order in which they are read."""
Q = {5: 0.5, 9: 0.25, 2: 0.25}


def sources() -> DeviceSources:
    return DeviceSources(WIDTH, MOST, CPU)


def put(
    into: DeviceSources, drafted: int, q: dict[int, float], row: int = 6, position: int = 20
) -> None:
    """A token was sampled."""
    tokens, probabilities = np.array(list(q), np.int32), np.array(list(q.values()), np.float32)

    def one(number: int) -> Any:
        return np.array([number], np.int32)

    into.sampled(one(row), one(position), one(len(q)), tokens, probabilities, one(drafted))


def read(
    found: DeviceSources,
    drafts: list[int],
    row: int = 6,
    first: int = 20,
    drafted: int = DEPTH,
    life: int | None = None,
) -> list[dict[int, float]]:
    """The distribution of each token that is proposed from there."""
    rows = torch.tensor([row])
    sampled = found.read(
        rows,
        found.lives(rows.clamp(0, MAX_ROWS - 1)) if life is None else torch.tensor([life]),
        torch.tensor([first]),
        torch.tensor([drafts]),
        torch.tensor([drafted]),
        AHEAD,
    )
    each = zip(sampled.tokens[0].tolist(), sampled.logs[0].exp().tolist(), strict=True)
    result = [dict(zip(tokens, q, strict=True)) for tokens, q in each]
    assert int(sampled.count[0]) == sum(len(q) > 1 for q in result)
    return result


def test_what_a_token_was_sampled_from_is_found_with_it_alone() -> None:
    held = sources()
    assert read(held, [5, 1, 1]) == [{5: 1.0}, {1: 1.0}, {1: 1.0}]
    put(held, 5, Q)
    put(held, 9, Q, position=22)
    assert read(held, [5, 1, 9]) == [Q, {1: 1.0}, Q]
    assert read(held, [9, 1, 9])[0] == {9: 1.0}  # of the same distribution, but another was drawn
    assert read(held, [5, 1, 9], first=20 + WIDTH)[0] == {5: 1.0}
    assert read(held, [5, 1, 9], row=7)[0] == {5: 1.0}
    assert read(held, [5, 1, 9], drafted=2)[2] == {9: 1.0}


def test_what_is_forgotten_is_not_found() -> None:
    held = sources()
    put(held, 5, Q)
    held.forget([6])
    assert read(held, [5, 1, 1])[0] == {5: 1.0}


def test_a_certain_token_in_its_place_is_certain() -> None:
    held = sources()
    put(held, 5, Q)
    held.certain(np.array([6]), np.array([20], np.int32))
    assert read(held, [5, 1, 1])[0] == {5: 1.0}


@pytest.mark.parametrize("q", [{5: 0.5, 9: 0.25}, {9: 0.5, 2: 0.5}], ids=["sum", "not among them"])
def test_what_it_cannot_have_been_sampled_from_is_not_found(q: dict[int, float]) -> None:
    held = sources()
    put(held, 5, q)
    assert read(held, [5, 1, 1])[0] == {5: 1.0}


OTHER = {5: 0.75, 3: 0.25}


def at_two_moments(drafted: int, whole: bool) -> tuple[DeviceSources, DeviceSources]:
    """A row before it was used again and since then, or, if that is not ``whole``, meanwhile."""
    old, now = sources(), sources()
    put(old, 5, Q)
    put(now, 5, Q)
    with now.rewriting(np.array([6, -1, 10**6], np.int32)):
        now.forget([6])
        if not whole:
            return old, copied(now)
    put(now, drafted, OTHER)
    return old, now


def copied(of: DeviceSources) -> DeviceSources:
    copy = sources()
    for name in ARRAYS:
        getattr(copy, name).copy_(getattr(of, name))
    return copy


READS = [
    new
    for new in itertools.product([False, True], repeat=len(ARRAYS))
    if new[-1] or not any(new)  # the count of lives is read last
]
"""Which of the arrays are read once the row is used again."""


@pytest.mark.parametrize("new", READS)
@pytest.mark.parametrize("drafted", [5, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_what_was_read_while_a_row_is_used_again_is_certain(
    new: tuple[bool, ...], drafted: int, whole: bool
) -> None:
    old, now = at_two_moments(drafted, whole)
    mixed = sources()
    for name, is_new in zip(ARRAYS, new, strict=True):
        getattr(mixed, name).copy_(getattr(now if is_new else old, name))
    assert read(mixed, [5, 1, 1], life=0)[0] == ({5: 1.0} if any(new) else Q)


def test_the_row_is_sampled_from_again_once_it_has_begun_anew() -> None:
    _, now = at_two_moments(5, whole=True)
    assert read(now, [5, 1, 1], life=2)[0] == OTHER
    _, now = at_two_moments(5, whole=False)
    put(now, 5, OTHER)
    assert read(now, [5, 1, 1], life=1)[0] == {5: 1.0}


@given(seed=st.integers(0, 2**32 - 1))
def test_no_content_of_the_arrays_breaks_it(seed: int) -> None:
    held = sources()
    random = np.random.default_rng(seed)
    for name in ARRAYS:
        content = getattr(held, name).numpy().view(np.uint8)
        content[:] = random.integers(0, 256, content.shape, np.uint8)
    row = int(random.integers(-(2**31), 2**31))
    assert read(held, [5, 1, 2], row=row) == [{5: 1.0}, {1: 1.0}, {2: 1.0}]


def test_the_writer_puts_it_beside_the_tokens_that_the_draft_publishes() -> None:
    trees = DeviceTrees(SLOTS, DEPTH, VOCAB_SIZE, CPU, MOST)
    writer = TreeWriter(trees)
    writer.start(Ready(8, 100, 16))
    writer.announce(0)
    writer.assign(0, 1)
    one, none = pack([0]), pack([])
    writer.plant(
        Planted(one, pack([20]), pack([6]), pack([1]), one, pack([7]), pack_floats(np.ones(1, "f")))
    )
    q_tokens = pack(list(Q))
    q = pack_floats(np.array(list(Q.values()), np.float32))
    chances = pack_floats(np.full(1, 0.5, np.float32))
    certainly = Stepped(pack([6]), pack([4]), none, chances)
    by_chance = Stepped(pack([6]), pack([9]), none, chances, one, pack([3]), q_tokens, q)
    writer.steps([certainly, by_chance])
    assert trees.host_tokens[6, :3].tolist() == [7, 4, 9]
    assert trees.sources is not None
    assert read(trees.sources, [7, 4, 9]) == [{7: 1.0}, {4: 1.0}, Q]
    writer.plant(
        Planted(one, pack([30]), pack([6]), pack([0]), one, none, pack_floats(np.ones(0, "f")))
    )
    assert read(trees.sources, [7, 4, 9])[2] == Q  # the row is still the tree's own
    writer.drop(0)
    writer.announce(1)
    writer.plant(
        Planted(
            pack([1]), pack([20]), pack([6]), pack([0]), one, none, pack_floats(np.ones(0, "f"))
        )
    )
    assert read(trees.sources, [7, 4, 9])[2] == {9: 1.0}


# ---- vLLM's logits


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
