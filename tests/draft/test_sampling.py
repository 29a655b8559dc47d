"""q' and what is drawn from it, against loops over the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_ssd.draft.model import Sampling
from vllm_ssd.draft.sampling import (
    SMALLEST,
    draw,
    joined,
    own_generator,
    proposals,
    send_sampling,
    split,
    stated_probabilities,
)
from vllm_ssd.wire.messages import MAX_STOP_TOKENS

CPU = torch.device("cpu")


def sampling(
    count: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    ends: tuple[int, ...] = (),
    weighed: int = 0,
    weight: float = 1.0,
    sampled: bool = True,
) -> Sampling:
    """The same for all of ``count`` sequences."""
    stop = np.full((count, MAX_STOP_TOKENS), -1, np.int32)
    stop[:, : len(ends)] = ends
    return Sampling(
        np.full(count, sampled),
        np.full(count, temperature, np.float32),
        np.full(count, top_k, np.int32),
        np.full(count, top_p, np.float32),
        stop,
        np.full(count, weighed, np.int32),
        np.full(count, weight, np.float32),
    )


def dense(
    logits: NDArray[np.float64],
    tokens: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    ends: tuple[int, ...],
    weighed: int,
    weight: float,
) -> NDArray[np.float64]:
    """q' over the given tokens, one step of the definition after the other."""
    q = np.exp((logits - logits.max()) / temperature)
    if 0 < top_k < len(q):
        q[logits < logits[top_k - 1]] = 0.0
    q /= q.sum()
    if top_p < 1.0:
        before = np.cumsum(q) - q
        q[before >= top_p] = 0.0
    for i, token in enumerate(tokens):
        if token in ends:
            q[i] = 0.0
    ended = q.sum() <= (0.5 if tokens[0] in ends else 0.0)
    lighter, left = q.copy(), weighed
    for i in range(len(q)):
        if left and q[i] > 0.0:
            lighter[i] *= weight
            left -= 1
    if lighter.sum() > 1e-6:
        q = lighter
    q[q < SMALLEST * q.sum()] = 0.0
    if ended:
        return np.eye(len(q))[0]
    return q / q.sum()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_q_is_what_its_definition_says(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 20), label="N")
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    logits = np.sort(rng.normal(0.0, 3.0, count).astype(np.float32))[::-1].copy()
    tokens = rng.permutation(100)[:count].astype(np.int32)
    given_: dict[str, Any] = {
        "temperature": data.draw(st.sampled_from([0.01, 0.3, 1.0, 1.7])),
        "top_k": data.draw(st.sampled_from([0, 1, 3, 100])),
        # Not at a token's edge, where rounding decides.
        "top_p": data.draw(st.sampled_from([1.0, 0.937, 0.511])),
        "ends": tuple(tokens[: data.draw(st.integers(0, 3))].tolist()),
        "weighed": data.draw(st.integers(0, 5)),
        "weight": data.draw(st.sampled_from([1.0, 0.5, 0.0])),
    }
    sent = send_sampling(sampling(3, **given_), CPU)
    values = torch.from_numpy(logits).expand(3, -1)
    ids = torch.from_numpy(tokens).expand(3, -1)
    q = proposals(values, ids, sent)
    assert q.dtype == torch.float32
    assert q.sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    expected = dense(logits.astype(np.float64), tokens.tolist(), **given_)
    # Where the smallest are cut, rounding decides.
    close = np.isclose(q[0].numpy(), expected, atol=1e-5) | (expected < 1.001 * SMALLEST)
    assert close.all()
    drawn = draw(q, ids, torch.Generator().manual_seed(0)).tolist()
    for token in drawn:
        chance = float(q[0, tokens.tolist().index(token)])
        assert chance > 0.0
        assert token not in given_["ends"] or chance == 1.0


def test_tokens_come_as_often_as_q_says() -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0]])
    ids = torch.tensor([[7, 3, 9, 1, 4]], dtype=torch.int32)
    sent = send_sampling(sampling(1, 0.8, ends=(3,), weighed=1, weight=0.5), CPU)
    q = proposals(logits, ids, sent)
    assert q[0, 1] == 0.0
    count = 40_000
    generator = torch.Generator().manual_seed(3)
    drawn = draw(q.expand(count, -1), ids.expand(count, -1), generator)
    seen = np.array([(drawn == token).sum() for token in ids[0]])
    expected = q[0].double().numpy() * count
    possible = expected > 0.0
    assert seen[~possible].sum() == 0
    chi2 = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi2 < 16.3  # p = 0.001 with 3 degrees of freedom
    # And not as often as without C.
    plain = proposals(logits, ids, send_sampling(sampling(1, 0.8, ends=(3,)), CPU))
    wrong = plain[0].double().numpy()[possible] * count
    assert ((seen[possible] - wrong) ** 2 / wrong).sum() > 100.0


def test_rows_that_sample_and_rows_that_do_not_share_a_step() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8]] * 3)
    ids = torch.tensor([[4, 5, 6]] * 3, dtype=torch.int32)
    some = sampling(3)
    some.sampled[1] = False
    some.temperature[2] = 0.0
    some.sampled[2] = False
    q = proposals(logits, ids, send_sampling(some, CPU))
    assert q[0].max() < 0.5
    assert q[1:].tolist() == [[1.0, 0.0, 0.0]] * 2
    assert set(draw(q, ids, own_generator(CPU)).tolist()[1:]) == {4}


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_first_choice_is_certain_if_it_is_a_likely_end_token(weight: float) -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    ids = torch.tensor([[4, 5, 6]], dtype=torch.int32)
    only = sampling(1, top_k=2, ends=(4, 5), weighed=1, weight=weight)
    q = proposals(logits, ids, send_sampling(only, CPU))
    assert q.tolist() == [[1.0, 0.0, 0.0]]
    likely = sampling(1, ends=(4,), weighed=1, weight=weight)
    assert proposals(logits, ids, send_sampling(likely, CPU)).tolist() == [[1.0, 0.0, 0.0]]
    # An end token that is less likely than the others together is left to the target.
    hot = sampling(1, temperature=9.0, ends=(4,))
    assert proposals(logits, ids, send_sampling(hot, CPU))[0, 0] == 0.0


def test_all_is_sampled_if_c_would_leave_nothing() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    ids = torch.tensor([[4, 5]], dtype=torch.int32)
    both = proposals(logits, ids, send_sampling(sampling(1, weighed=9, weight=0.0), CPU))
    assert both.tolist() == [pytest.approx(torch.tensor([1.0, 0.0]).softmax(0).tolist())]
    one = proposals(logits, ids, send_sampling(sampling(1, weighed=1, weight=0.0), CPU))
    assert one.tolist() == [[0.0, 1.0]]


def test_garbage_in_the_logits_is_no_sample() -> None:
    logits = torch.tensor([[float("nan")] * 3, [1.0, float("-inf"), float("-inf")]])
    ids = torch.tensor([[4, 5, 6]] * 2, dtype=torch.int32)
    q = proposals(logits, ids, send_sampling(sampling(2), CPU))
    assert q.tolist() == [[1.0, 0.0, 0.0]] * 2


def test_stated_probabilities_are_those_of_the_requests_own_sampling() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 3)
    some = sampling(3, temperature=0.5, top_k=3)
    some.temperature[1] = 0.0  # greedy: as the draft states them
    some.top_p[2] = 0.5
    found = stated_probabilities(logits, send_sampling(some, CPU))
    hot = torch.tensor([4.0, 2.0, 0.0]).softmax(0).tolist()
    assert found[0].tolist() == pytest.approx([*hot, 0.0])
    assert found[1].tolist() == pytest.approx(logits[1].softmax(0).tolist())
    assert found[2].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_parameters_arrive_on_a_device_as_they_are_on_the_host() -> None:
    given_ = sampling(3, 0.7, 5, 0.9, (4, 8), 2, 0.3)
    given_.sampled[1] = False
    sent = split(torch.from_numpy(joined(given_)), given_)
    here = send_sampling(given_, CPU)
    assert sent.weighs
    for arrived, expected in zip(sent[:-1], here[:-1], strict=True):
        assert isinstance(arrived, torch.Tensor)
        assert arrived.dtype == expected.dtype  # type: ignore[union-attr]
        assert arrived.tolist() == expected.tolist()  # type: ignore[union-attr]


def test_each_generator_has_numbers_of_its_own() -> None:
    torch.manual_seed(0)
    first = torch.rand(4, generator=own_generator(CPU)).tolist()
    torch.manual_seed(0)
    assert torch.rand(4, generator=own_generator(CPU)).tolist() != first
