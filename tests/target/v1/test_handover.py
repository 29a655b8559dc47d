"""What drafts were sampled from reaches vLLM's rejection sampler: through its own functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.engine.exact_distribution import p_value
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.lookup import LookUp, answer
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.requests import Tracked
from vllm_ssd.target.sources import read_sources
from vllm_ssd.target.v1 import handover
from vllm_ssd.target.v1.handover import HandOver
from vllm_ssd.target.v1.rejection import fix_cpu_rejection_sampler
from vllm_ssd.wire.messages import Forked, Planted, Ready, Stepped
from vllm_ssd.wire.packing import pack, pack_floats

DEPTH, VOCABULARY, SUPPORT = 3, 12, 8
BASE = 20
REQUESTS, ROUNDS = 1000, 10
ENOUGH = 1e-3
CHANCE = np.random.default_rng(5)
P = CHANCE.dirichlet(np.full(VOCABULARY, 0.7), DEPTH + 1).astype(np.float32)
"""The target's distribution at each position, whatever comes before."""
Q = np.zeros_like(P)
Q[:, :SUPPORT] = CHANCE.dirichlet(np.full(SUPPORT, 0.7), DEPTH + 1)
"""The draft's."""


class Target:
    """A batch of requests, their trees, and the runner's attributes that are used.

    Args:
        requests: how many.
        vocab_size: of target and draft.
    """

    def __init__(self, requests: int = REQUESTS, vocab_size: int = VOCABULARY) -> None:
        self.names = [f"request-{i}" for i in range(requests)]
        self.published = PublishedTrees(DEPTH, vocab_size, SUPPORT)
        self.published.start(Ready(min(requests, 1024), 0, 16))
        self.runner: Any = SimpleNamespace(
            device="cpu",
            input_batch=SimpleNamespace(req_ids=self.names, all_greedy=False),
            _draft_probs=None,
            _draft_prob_req_ids=None,
        )
        self.stats = Stats()
        self.hand_over = HandOver(self.runner, DEPTH, vocab_size, requests, self.stats)
        for handle in range(requests):
            self.published.announce(handle)

    def draft(
        self,
        tokens: np.ndarray[Any, Any],
        q: np.ndarray[Any, Any] | None,
        certain: Sequence[int] = (),
    ) -> None:
        """The draft publishes a trunk for each request.

        Args:
            tokens: ``[requests, n]``.
            q: ``[n, SUPPORT]``, the distribution of each position over the first tokens.
            certain: positions whose token is certain.
        """
        rows = list(range(len(tokens)))
        zeros = pack([0] * len(rows))
        self.published.plant(
            Planted(pack(rows), pack([BASE] * len(rows)), pack(rows), zeros, zeros, b"", b"")
        )
        for at, column in enumerate(tokens.T.astype(np.int32)):
            step = Stepped(
                pack(rows), pack(column), b"", pack_floats(np.ones(len(rows), np.float32))
            )
            if q is not None and at not in certain:
                among = np.tile(np.arange(SUPPORT, dtype=np.int32), (len(rows), 1))
                shares = np.tile(q[at].astype(np.float32), (len(rows), 1))
                step = Stepped(
                    step.rows,
                    step.tokens,
                    b"",
                    step.chances,
                    pack(rows),
                    pack([SUPPORT] * len(rows)),
                    pack(among.ravel()),
                    pack_floats(shares),
                )
            self.published.steps([step])

    def look_ups(self, wanted: int = DEPTH) -> list[LookUp]:
        """All requests answered: the text is where the trunk begins."""
        found = self.published.cache.look_up(list(range(len(self.names))), [[] for _ in self.names])
        each = [
            LookUp(row, Tracked(row, BASE, 100), [], BASE, wanted, below)
            for row, below in enumerate(found)
        ]
        answer(each, Stats())
        return each

    def propose(self, look_ups: Sequence[LookUp]) -> list[list[int]]:
        """Hand over what is proposed, as the proposer does."""
        proposals = [each.request.proposed for each in look_ups]
        self.give(proposals, look_ups)
        return proposals

    def give(self, proposals: list[list[int]], look_ups: Sequence[LookUp]) -> None:
        self.runner._draft_probs = self.runner._draft_prob_req_ids = None  # as vLLM
        sources = read_sources(look_ups, self.published)
        self.hand_over.give(self.hand_over.collect(proposals, [sources] if sources else []))

    def probabilities(
        self, proposals: Mapping[str, Sequence[int]] | Sequence[Sequence[int]]
    ) -> torch.Tensor | None:
        """What vLLM's runner gives its sampler, ``[tokens, vocabulary]``."""
        drafts = list(proposals.values() if isinstance(proposals, Mapping) else proposals)
        metadata = SpecDecodeMetadata.make_dummy([list(one) for one in drafts], torch.device("cpu"))
        names = list(proposals) if isinstance(proposals, Mapping) else self.names
        self.runner.input_batch.req_ids = names
        given: torch.Tensor | None = GPUModelRunner._get_spec_decode_draft_probs(
            self.runner, metadata
        )
        self.runner.input_batch.req_ids = self.names
        return given

    def verify(self, proposals: list[list[int]]) -> list[list[int]]:
        """The tokens that vLLM's rejection sampler yields."""
        drafts = SpecDecodeMetadata.make_dummy(proposals, torch.device("cpu"))
        positions = [at for one in proposals for at in range(len(one))]
        chance: Any = SimpleNamespace(
            all_greedy=False, all_random=True, temperature=torch.ones(len(proposals)), generators={}
        )
        ends = torch.from_numpy(P[[len(one) for one in proposals]])
        output = rejection_sampler.rejection_sample(
            drafts.draft_token_ids,
            drafts.num_draft_tokens,
            drafts.max_spec_len,
            drafts.cu_num_draft_tokens,
            self.probabilities(proposals),
            torch.from_numpy(P[positions]).log(),
            torch.multinomial(ends, 1).to(torch.int32),
            chance,
        )
        return rejection_sampler.RejectionSampler.parse_output(output, VOCABULARY)[0]


@pytest.fixture(autouse=True)
def _in_a_worker() -> None:
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    fix_cpu_rejection_sampler()
    torch.manual_seed(11)


def sampled_tokens(q: np.ndarray[Any, Any], requests: int = REQUESTS) -> np.ndarray[Any, Any]:
    """``[requests, positions]``, drawn from the distribution of each position."""
    columns = [CHANCE.choice(len(one), requests, p=one / one.sum()) for one in q.astype(np.float64)]
    return np.stack(columns, axis=1)


def smallest_p_value(texts: Sequence[Sequence[int]]) -> float:
    """Of the tests of all positions; the target's distributions do not depend on each other."""
    return min(
        p_value([text[at] for text in texts if len(text) > at], torch.from_numpy(P[at]))
        for at in range(DEPTH + 1)
        if sum(len(text) > at for text in texts) > 200
    )


@pytest.mark.parametrize("certain", [(), (1,), (0, 2)])
@pytest.mark.parametrize("wanted", [1, DEPTH])
def test_sampled_drafts_yield_the_targets_distribution(
    wanted: int, certain: tuple[int, ...]
) -> None:
    texts = []
    for _ in range(ROUNDS):
        target = Target()
        tokens = sampled_tokens(Q[:DEPTH])
        tokens[:, certain] = 4
        target.draft(tokens, Q[:, :SUPPORT], certain)
        texts += target.verify(target.propose(target.look_ups(wanted)))
    assert smallest_p_value(texts) > ENOUGH
    # As often as p and q' have in common, and not as often as if the drafts were certain.
    if 0 not in certain:
        accepted = sum(len(text) > 1 for text in texts) / len(texts)
        assert accepted == pytest.approx(np.minimum(P[0], Q[0]).sum(), abs=0.02)


@pytest.mark.parametrize("wrong", ["another temperature", "one entry cut off", "for certain"])
def test_the_comparison_finds_a_wrong_distribution(wrong: str) -> None:
    given = Q[:, :SUPPORT].copy()
    certain: tuple[int, ...] = ()
    if wrong == "another temperature":
        given = given**0.5
    elif wrong == "one entry cut off":
        given[:, P[:DEPTH, :SUPPORT].sum(0).argmax()] = 1e-6
    given /= given.sum(axis=1, keepdims=True)
    texts = []
    for _ in range(ROUNDS):
        target = Target()
        tokens = sampled_tokens(Q[:DEPTH])
        if wrong == "for certain":
            tokens[:, 0] = 4  # not sampled, but said to be
        target.draft(tokens, given, certain)
        texts += target.verify(target.propose(target.look_ups()))
    assert smallest_p_value(texts) < 1e-6


def test_a_batch_too_large_for_its_rows_is_verified_as_certain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handover, "LARGEST_BYTES", 1 << 10)
    texts = []
    for _ in range(ROUNDS):
        target = Target()
        target.draft(sampled_tokens(Q[:DEPTH]), Q[:, :SUPPORT])
        proposals = target.propose(target.look_ups())
        assert target.probabilities(proposals) is None
        assert target.stats.batches_too_large == 1
        texts += target.verify(proposals)
    assert smallest_p_value(texts) > ENOUGH


def dense(*rows: Mapping[int, float] | int) -> list[list[float]]:
    """Rows of probabilities from distributions, or certain tokens."""
    result = np.zeros((len(rows), VOCABULARY), np.float32)
    for row, entries in zip(result, rows, strict=True):
        for token, share in ({entries: 1.0} if isinstance(entries, int) else entries).items():
            row[token] = share
    return result.tolist()


def small(requests: int = 3) -> Target:
    """Request 0 has a sampled, a certain and another sampled token, the others one that is."""
    target = Target(requests)
    tokens = np.array([[5, 6, 7]] * requests)
    target.draft(tokens, Q[:, :SUPPORT], certain=(1,))
    return target


def given_of(target: Target, proposals: Any) -> list[list[float]]:
    found = target.probabilities(proposals)
    assert found is not None
    return found.tolist()


Q0, Q2 = (dict(enumerate(Q[at, :SUPPORT])) for at in (0, 2))


def test_every_drafted_request_has_a_row() -> None:
    target = small()
    look_ups = target.look_ups()
    look_ups[1].request.proposed = []  # another proposer's, say the n-gram's, in its place
    proposals = [look_ups[0].request.proposed, [9, 9], [5, 6, 7, 8][:DEPTH]]
    target.give(proposals, look_ups[:2])
    assert given_of(target, proposals) == dense(Q0, 6, Q2, 9, 9, 5, 6, 7)


def test_what_was_added_to_a_find_is_certain() -> None:
    target = small(1)
    (look_up,) = target.look_ups(wanted=1)
    target.give([[5, 6, 7]], [look_up])  # filled up with tokens that happen to be in the tree
    assert given_of(target, [[5, 6, 7]]) == dense(Q0, 6, 7)


def test_rows_follow_their_requests_and_are_cut_with_their_drafts() -> None:
    target = small()
    target.propose(target.look_ups())
    proposals = {"request-2": [5], "request-1": [], "request-0": [5, 6]}
    assert given_of(target, proposals) == dense(Q0, Q0, 6)


def test_nothing_is_left_of_the_batch_before() -> None:
    target = small()
    target.propose(target.look_ups())
    target.draft(np.array([[3]] * 3), None)
    target.published.fork(Forked(pack([0]), pack([1]), pack([1]), pack([0]), pack([2]), pack([1])))
    target.draft(np.array([[5, 4]] * 2), Q[:, :SUPPORT], certain=(0,))
    look_ups = target.look_ups()
    proposals = target.propose(look_ups)
    assert proposals[:2] == [[5, 4]] * 2
    rest = [dict(enumerate(Q[1, :SUPPORT]))] * 2
    assert given_of(target, proposals) == dense(5, rest[0], 5, rest[1], *proposals[2])


def test_a_batch_of_certain_drafts_is_handed_over_as_such() -> None:
    target = Target(2)
    target.draft(np.array([[5, 6]] * 2), None)
    proposals = target.propose(target.look_ups())
    assert proposals == [[5, 6]] * 2
    assert target.runner._draft_probs is None
    assert target.probabilities(proposals) is None


def test_drafts_of_an_earlier_proposal_and_placeholders_get_rows() -> None:
    target = small()
    target.propose(target.look_ups())
    scheduled = {"waited": [4, 3], "request-1": [5], "new": [-1] * DEPTH}
    target.hand_over.complete(scheduled)
    nothing: dict[int, float] = {}
    assert given_of(target, scheduled) == dense(4, 3, Q0, nothing, nothing, nothing)
    # They are of that step only.
    target.propose(target.look_ups())
    assert target.runner._draft_prob_req_ids == target.names
    assert not target.hand_over._dense[3 * DEPTH * VOCABULARY :].any()


def test_rows_that_vllm_has_dropped_are_not_completed() -> None:
    target = small()
    target.propose(target.look_ups())
    target.runner._draft_probs = target.runner._draft_prob_req_ids = None
    target.hand_over.complete({"waited": [4, 3]})
    assert target.runner._draft_probs is None


def test_rows_that_become_too_large_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    target = small()
    proposals = target.propose(target.look_ups())
    monkeypatch.setattr(handover, "LARGEST_BYTES", 3 * DEPTH * VOCABULARY * 4)
    target.hand_over.complete({"waited": [4, 3]})
    assert target.probabilities(proposals) is None


def test_a_draft_of_a_request_without_probability_is_replaced_from_the_whole_of_p() -> None:
    # As placeholders are: rejected for sure, and what takes their place is drawn from p - 0.
    target = Target(4000)
    target.runner._draft_probs = torch.zeros(4000, DEPTH, VOCABULARY)
    target.runner._draft_prob_req_ids = target.names
    texts = target.verify([[-1] * DEPTH for _ in target.names])
    assert {len(text) for text in texts} == {1}
    assert smallest_p_value(texts) > ENOUGH


class Group:
    """Stands in for vLLM's group of ranks: hands on what the first one sends."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        if obj is None and self.sent:
            return self.sent.pop(0)
        self.sent.append(obj)
        return obj


def test_all_ranks_have_the_same_rows() -> None:
    group = Group()
    first, second = small(), small()
    first.hand_over.group = second.hand_over.group = group
    proposals = first.propose(first.look_ups())
    second.hand_over.receive()
    assert given_of(second, proposals) == given_of(first, proposals) == dense(*(Q0, 6, Q2) * 3)


def test_what_is_proposed_is_read_before_its_row_goes_to_another_branch() -> None:
    target = small(2)
    look_ups = target.look_ups()
    proposals = [each.request.proposed for each in look_ups]
    sources = read_sources(look_ups, target.published)
    assert sources is not None
    # While the target waits for other requests, both rows begin anew.
    target.draft(np.array([[7, 6, 5]] * 2), Q[::-1, :SUPPORT])
    target.hand_over.give(target.hand_over.collect(proposals, [sources]))
    assert given_of(target, proposals) == dense(Q0, 6, Q2, Q0, 6, Q2)
