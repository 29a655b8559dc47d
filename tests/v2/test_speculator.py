"""The speculator: whom it tells of what, and that its errors keep no other rank waiting."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.draft_end import DraftEnd, client_of
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.draft_thread import DraftThread
from vllm_ssd.target.v2.outcomes import OutcomeReadback
from vllm_ssd.target.v2.proposals import Proposals
from vllm_ssd.target.v2.slots import Slots
from vllm_ssd.target.v2.speculator import Drafts, SSDSpeculator

DEPTH, SLOTS, LENGTH = 3, 4, 8
CPU = torch.device("cpu")


class Group:
    """The tensor-parallel ranks, of which this is the first."""

    def __init__(self) -> None:
        self.broadcasts: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        assert src == 0
        self.broadcasts.append(tensor)
        return tensor


class Rank:
    """The first of several ranks, with one request in slot 2."""

    def __init__(self, strict: bool) -> None:
        self.stats = Stats()
        self.told: list[Any] = []
        self.outcomes: list[list[int]] = []
        self.broken = False
        self.draft = DraftEnd()
        client = client_of(self.draft, self.stats, lambda: None)
        self.thread = DraftThread(client, self.stats, strict)
        self.group = Group()
        states = self.states = SimpleNamespace(
            max_num_reqs=SLOTS,
            device=CPU,
            all_token_ids=SimpleNamespace(gpu=torch.full((SLOTS, LENGTH), 7, dtype=torch.int32)),
            total_len=SimpleNamespace(gpu=torch.full((SLOTS,), 5, dtype=torch.int32)),
            last_sampled_tokens=torch.full((SLOTS, 1), 7),
        )
        drafts = Drafts(
            Proposals(DeviceTrees(SLOTS, DEPTH, 512, CPU), states, from_text=False),
            Slots(SLOTS, lambda gone, begun: self.told.append((gone, begun))),
            OutcomeReadback(CPU, self._deliver, self.thread.report),
            self.thread,
            self.told.append,
        )
        self.speculator = SSDSpeculator(DEPTH, states, self.stats, drafts, self.group)
        self.speculator.serving = True

    def _deliver(self, serials: list[int], outcome: Any) -> None:
        if self.broken:
            raise KeyError("a mistake")
        self.outcomes.append(serials)

    def schedule(self, slots: dict[str, int] | None = None, drafts: int = DEPTH) -> None:
        """A step begins, in which a request comes."""
        step: Any = SimpleNamespace(
            finished_req_ids=set(),
            preempted_req_ids=None,
            scheduled_new_reqs=[SimpleNamespace(req_id="a")],
            num_scheduled_tokens={"a": 1 + drafts},
            scheduled_spec_decode_tokens={"a": [-1] * drafts} if drafts else {},
        )
        self.speculator.scheduled(step, {"a": 2} if slots is None else slots)

    def propose(self) -> list[list[int]]:
        one = torch.ones(1, dtype=torch.int32)
        batch: Any = SimpleNamespace(
            num_reqs=1, idx_mapping=torch.tensor([2]), idx_mapping_np=np.array([2])
        )
        none: Any = None
        drafts = self.speculator.propose(
            batch, none, none, none, none, one, one, none, none, none, none
        )
        proposed: list[list[int]] = drafts.tolist()
        return proposed


@pytest.fixture(params=[False])
def rank(request: pytest.FixtureRequest) -> Iterator[Rank]:
    rank = Rank(strict=request.param)
    yield rank
    rank.thread.close()
    rank.draft.dies()


strict = pytest.mark.parametrize("rank", [True], indirect=True, ids=["strict"])


def test_a_request_is_told_with_its_outcomes(rank: Rank) -> None:
    rank.schedule()
    assert rank.propose() == [[7] * DEPTH]
    assert len(rank.told) == 1
    assert rank.outcomes == [[0]]
    assert (rank.stats.proposals, rank.stats.notices) == (1, 1)


@pytest.mark.parametrize("drafts", [0, DEPTH - 1])
def test_a_proposal_that_was_cut_is_told(rank: Rank, drafts: int) -> None:
    rank.schedule(drafts=drafts)
    assert rank.told[1:] == [[(0, drafts)]]


def test_nobody_is_told_of_vllms_own_requests_while_it_warms_up(rank: Rank) -> None:
    rank.speculator.serving = False
    rank.schedule()
    assert rank.propose() == [[7] * DEPTH]
    assert rank.told == rank.outcomes == []
    assert (rank.stats.proposals, rank.stats.notices) == (0, 0)
    assert len(rank.group.broadcasts) == 1


def test_after_an_error_decoding_goes_on(rank: Rank) -> None:
    rank.schedule()
    rank.broken = True
    assert rank.propose() == [[0] * DEPTH]
    rank.broken = False
    rank.schedule({})  # no slot
    assert rank.propose() == [[7] * DEPTH]
    assert rank.thread.ask(lambda: rank.stats.errors) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has to fail")
def test_without_cuda_graphs_the_look_up_goes_on(rank: Rank) -> None:
    rank.states.device = torch.device("cuda")
    rank.speculator.capture()
    rank.states.device = CPU
    assert rank.propose() == [[7] * DEPTH]
    assert rank.thread.ask(lambda: rank.stats.errors) == 1


@strict
@pytest.mark.parametrize("where", ["scheduled", "propose"])
def test_an_error_is_raised_once_the_other_ranks_have_what_they_wait_for(
    rank: Rank, where: str
) -> None:
    if where == "scheduled":
        rank.schedule({})
    else:
        rank.broken = True
    with pytest.raises(KeyError):
        rank.propose()
    assert len(rank.group.broadcasts) == 1


@pytest.mark.parametrize(("is_first", "kind"), [(True, KeyError), (False, SystemExit)])
def test_a_rank_that_cannot_verify_as_the_others_do_ends(
    rank: Rank, is_first: bool, kind: type[BaseException]
) -> None:
    """vLLM only logs an exception of another rank than the first, and goes on with its step."""

    def fail(*of: Any) -> None:
        raise KeyError("a mistake")

    sampling: Any = SimpleNamespace(wanted=True, hand_over=fail)
    rank.speculator._sampling = sampling
    if not is_first:
        rank.speculator._drafts = None
    with pytest.raises(kind):
        rank.propose()
