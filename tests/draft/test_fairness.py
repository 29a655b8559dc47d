"""What targets that share a draft take from each other when rows or blocks run short."""

from __future__ import annotations

from tests.draft.invariants import check_always, guard_writes
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.draft.fairness import Part
from vllm_ssd.draft.request import DORMANT

BLOCK = 4


def targets(max_rows: int, blocks: int, branches: int = 0) -> list[Simulation]:
    """Three targets of one draft, with so many rows and usable blocks in all."""
    sizes = Sizes(
        max_rows=max_rows,
        num_blocks=blocks + 1,
        block_size=BLOCK,
        max_length=400,
        fan_out=None,
        branches=branches,
        caching=False,
    )
    first = Simulation(sizes)
    guard_writes(first)
    return [first, *(Simulation(sizes, beside=first) for _ in range(2))]


def text(blocks: int, first: int) -> list[int]:
    """A prompt that takes so many blocks, and that nobody else has."""
    return [first, *(i % 5 + 1 for i in range(blocks * BLOCK - 2))]


def goes_on(sim: Simulation, request: TargetRequest) -> None:
    """A round with one of a target's requests; its others were not used in it."""
    sim.verify(request, 0, sim.best(request.text)[0])
    sim.settle()


def trunks(sim: Simulation) -> int:
    return sum(one.trunk != DORMANT for one in sim.session.share.requests.values())


def test_what_is_beyond_in_rows_is_no_help_where_blocks_are_missing() -> None:
    assert Part(3, -5).helps(Part(1, 0))
    assert not Part(3, -5).helps(Part(0, 4))
    assert not Part(3, -5).helps(Part(-1, 4))
    assert Part(-2, 1).helps(Part(1, 1))


def test_who_holds_too_many_rows_gives_up_no_blocks() -> None:
    long, wide, late = targets(max_rows=24, blocks=120)
    # Eight rows and 40 blocks each are fair.
    idle, used = long.start(text(60, 6)), long.start(text(2, 7))
    long.settle()
    goes_on(long, used)
    for first in (8, 9):
        wide.start(text(2, first))
    wide.settle()
    rows, blocks = wide.session.share.held_rows(), wide.session.share.held_blocks()
    assert rows > 8
    assert blocks < 40
    assert long.session.share.held_blocks() > 60
    request = late.start(text(36, 10))
    late.settle()
    for sim in (long, wide, late):
        check_always(sim)
    assert late.session.share.requests[request.handle].trunk != DORMANT
    # For the new trunk it gives one row at most; the blocks are taken of the other one.
    assert wide.session.share.held_rows() >= rows - 1
    assert long.session.share.requests[idle.handle].trunk == DORMANT


def test_nothing_is_evicted_where_what_is_beyond_is_in_use() -> None:
    many, one, late = targets(max_rows=60, blocks=60, branches=1)
    # 20 blocks each are fair. One uses all that it holds; of what the other holds, most is fair.
    used = one.start(text(30, 6))
    one.settle()
    small = [many.start(text(2, 1 + n)) for n in range(7)]
    many.settle()
    goes_on(many, small[0])
    goes_on(one, used)
    before = trunks(many), trunks(one)
    assert 20 < many.session.share.held_blocks() < 25
    request = late.start(text(19, 11))
    late.settle()
    for sim in (many, one, late):
        check_always(sim)
    assert late.session.share.requests[request.handle].trunk == DORMANT
    assert (trunks(many), trunks(one)) == before
