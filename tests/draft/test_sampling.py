"""q' and what is drawn from it, against loops over the definitions."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_ssd.draft.choosing import Chooser
from vllm_ssd.draft.model import Sampling
from vllm_ssd.draft.sampling import (
    SMALLEST,
    Parameters,
    draw,
    joined,
    own_generator,
    parameters_on_host,
    proposals,
    requested,
    shares,
    split,
)
from vllm_ssd.wire.messages import MAX_STOP_TOKENS

CPU = torch.device("cpu")
Library = Literal["numpy", "torch"]
LIBRARIES: tuple[Library, ...] = ("numpy", "torch")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Any:
    """What computes."""
    return request.param


def parameters(of: Sampling, library: Library) -> Parameters:
    """As the model's device gets them."""
    here = parameters_on_host(of)
    return here if library == "numpy" else split(torch.from_numpy(joined(here)), here)


def as_arrays(library: Library, *values: Any) -> list[Any]:
    """The same numbers, for the library."""
    return [np.asarray(v) if library == "numpy" else torch.as_tensor(v) for v in values]


def q_of(logits: Any, tokens: Any, of: Sampling, library: Library = "numpy") -> NDArray[np.float32]:
    """q' of each row."""
    values, ids = as_arrays(library, np.array(logits, np.float32), np.array(tokens, np.int32))
    sent = parameters(of, library)
    q: NDArray[np.float32] = np.asarray(proposals(requested(values, sent), ids, sent))
    assert q.dtype == np.float32
    return q


def drawn_from(
    q: NDArray[np.float32], tokens: Any, uniform: NDArray[np.float64], library: Library = "numpy"
) -> list[int]:
    """A token of each row."""
    tokens = np.array(tokens, np.int32)
    found: list[int] = draw(*as_arrays(library, q, tokens, uniform[:, None])).tolist()
    return found


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
        q /= q.sum()
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
    expected = dense(logits.astype(np.float64), tokens.tolist(), **given_)
    for library in LIBRARIES:
        q = q_of([logits] * 3, [tokens] * 3, sampling(3, **given_), library)
        assert q.sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
        # Where the smallest are cut, rounding decides.
        close = np.isclose(q[0], expected, atol=1e-5) | (expected < 1.001 * SMALLEST)
        assert close.all()
        for token in drawn_from(q, [tokens] * 3, rng.random(3), library):
            chance = float(q[0, tokens.tolist().index(token)])
            assert chance > 0.0
            assert token not in given_["ends"] or chance == 1.0


def test_host_and_device_draw_the_same_tokens_from_the_same_numbers() -> None:
    rng = np.random.default_rng(5)
    count, width = 400, 64
    logits = -np.sort(-rng.normal(0.0, 2.0, (count, width)).astype(np.float32), axis=1)
    tokens = rng.permuted(np.tile(np.arange(1000, dtype=np.int32), (count, 1)), axis=1)[:, :width]
    mixed = Sampling(
        rng.random(count) < 0.8,
        rng.choice([0.0, 0.3, 1.0, 1.4], count).astype(np.float32),
        rng.choice([0, 5, 40], count).astype(np.int32),
        rng.choice([1.0, 0.937, 0.511], count).astype(np.float32),
        np.where(rng.random((count, 2)) < 0.5, tokens[:, :2], -1).astype(np.int32),
        rng.integers(0, 4, count).astype(np.int32),
        np.full(count, 0.3, np.float32),
    )
    q = {library: q_of(logits, tokens, mixed, library) for library in LIBRARIES}
    np.testing.assert_allclose(q["numpy"], q["torch"], atol=1e-6)
    uniform = rng.random(count)
    drawn = [drawn_from(q["numpy"], tokens, uniform, library) for library in LIBRARIES]
    assert drawn[0] == drawn[1]
    assert (np.array(drawn[0]) != tokens[:, 0]).any()


@pytest.mark.parametrize("uniform", [0.0, 0.5, float(np.nextafter(1.0, 0.0))])
def test_no_number_draws_a_token_without_a_probability(library: Library, uniform: float) -> None:
    q = np.array([[0.0, 0.1, 0.2, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    first, second = drawn_from(q, [[5, 6, 7, 8, 9]] * 2, np.full(2, uniform), library)
    assert first == {0.0: 6, 0.5: 8}.get(uniform, 8)
    assert second == 5


def test_tokens_come_as_often_as_q_says(library: Library) -> None:
    logits, ids = [[2.0, 1.5, 1.0, 0.0, -1.0]], [[7, 3, 9, 1, 4]]
    q = q_of(logits, ids, sampling(1, 0.8, ends=(3,), weighed=1, weight=0.5), library)
    assert q[0, 1] == 0.0
    count = 40_000
    uniform = np.random.default_rng(3).random(count)
    drawn = np.array(drawn_from(q.repeat(count, 0), ids * count, uniform, library))
    seen = np.array([(drawn == token).sum() for token in ids[0]])
    expected = q[0].astype(np.float64) * count
    possible = expected > 0.0
    assert seen[~possible].sum() == 0
    chi2 = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi2 < 16.3  # p = 0.001 with 3 degrees of freedom
    # And not as often as without C.
    plain = q_of(logits, ids, sampling(1, 0.8, ends=(3,)), library)
    wrong = plain[0].astype(np.float64)[possible] * count
    assert ((seen[possible] - wrong) ** 2 / wrong).sum() > 100.0


def test_rows_that_sample_and_rows_that_do_not_share_a_step(library: Library) -> None:
    logits, ids = [[1.0, 0.9, 0.8]] * 3, [[4, 5, 6]] * 3
    some = sampling(3)
    some.sampled[1] = False
    some.temperature[2] = 0.0
    some.sampled[2] = False
    q = q_of(logits, ids, some, library)
    assert q[0].max() < 0.5
    assert q[1:].tolist() == [[1.0, 0.0, 0.0]] * 2
    assert set(drawn_from(q, ids, np.random.default_rng().random(3), library)[1:]) == {4}


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_first_choice_is_certain_if_it_is_a_likely_end_token(
    library: Library, weight: float
) -> None:
    logits, ids = [[5.0, 1.0, 0.0]], [[4, 5, 6]]
    only = sampling(1, top_k=2, ends=(4, 5), weighed=1, weight=weight)
    assert q_of(logits, ids, only, library).tolist() == [[1.0, 0.0, 0.0]]
    likely = sampling(1, ends=(4,), weighed=1, weight=weight)
    assert q_of(logits, ids, likely, library).tolist() == [[1.0, 0.0, 0.0]]
    # An end token that is less likely than the others together is left to the target.
    hot = sampling(1, temperature=9.0, ends=(4,))
    assert q_of(logits, ids, hot, library)[0, 0] == 0.0


def test_all_is_sampled_if_c_would_leave_nothing(library: Library) -> None:
    logits, ids = [[1.0, 0.0]], [[4, 5]]
    both = q_of(logits, ids, sampling(1, weighed=9, weight=0.0), library)
    assert both.tolist() == [pytest.approx(torch.tensor([1.0, 0.0]).softmax(0).tolist())]
    one = q_of(logits, ids, sampling(1, weighed=1, weight=0.0), library)
    assert one.tolist() == [[0.0, 1.0]]


def test_garbage_in_the_logits_is_no_sample(library: Library) -> None:
    nan, inf = float("nan"), float("inf")
    logits = [[nan] * 3, [1.0, -inf, -inf], [-inf] * 3, [inf, 1.0, 0.0]]
    for some in (sampling(4), sampling(4, top_k=2, top_p=0.9, ends=(9,), weighed=1, weight=0.5)):
        q = q_of(logits, [[4, 5, 6]] * 4, some, library)
        assert q.tolist() == [[1.0, 0.0, 0.0]] * 4
    stated = requested(
        as_arrays(library, np.array(logits, np.float32))[0], parameters(some, library)
    )
    assert np.isfinite(np.asarray(shares(stated, 2))).all()


def test_stated_probabilities_are_those_of_the_requests_own_sampling(library: Library) -> None:
    logits = np.array([[2.0, 1.0, 0.0, -1.0]] * 3, np.float32)
    some = sampling(3, temperature=0.5, top_k=3)
    some.temperature[1] = 0.0  # greedy: as the draft states them
    some.top_p[2] = 0.5
    q = requested(as_arrays(library, logits)[0], parameters(some, library))
    found = shares(q, 4)
    hot = torch.tensor([4.0, 2.0, 0.0]).softmax(0).tolist()
    assert found[0].tolist() == pytest.approx([*hot, 0.0])
    assert found[1].tolist() == pytest.approx(torch.tensor(logits[1]).softmax(0).tolist())
    assert found[2].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert shares(q, 2)[0].tolist() == pytest.approx(
        torch.tensor(hot[:2]).div(sum(hot[:2])).tolist()
    )


def test_parameters_arrive_on_a_device_as_they_are_on_the_host() -> None:
    given_ = sampling(3, 0.7, 5, 0.9, (4, 8), 2, 0.3)
    given_.sampled[1] = False
    here = parameters_on_host(given_)
    sent = split(torch.from_numpy(joined(here)), here)
    assert sent[-3:] == here[-3:] == (True, True, True)
    for arrived, expected in zip(sent[:-3], here[:-3], strict=True):
        assert isinstance(arrived, torch.Tensor)
        assert arrived.numpy().dtype == expected.dtype
        assert arrived.tolist() == expected.tolist()


def test_each_generator_has_numbers_of_its_own() -> None:
    torch.manual_seed(0)
    first = torch.rand(4, generator=own_generator(CPU)).tolist()
    torch.manual_seed(0)
    assert torch.rand(4, generator=own_generator(CPU)).tolist() != first


def test_each_chooser_has_numbers_of_its_own() -> None:
    flat, drawn = torch.zeros(40, 30), []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        chosen = Chooser(4, 20, None, CPU).on_host(flat, sampling(40))
        assert chosen.tokens.shape == (40, 20)
        assert chosen.probabilities.tolist() == [[0.25] * 4] * 40
        drawn.append(chosen.next_tokens.tolist())
    assert drawn[0] != drawn[1]


def test_tokens_are_those_of_a_smaller_vocabulary() -> None:
    chooser = Chooser(2, 3, torch.tensor([7, 3, 9, 5], dtype=torch.int32), CPU)
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
    assert chooser.on_host(logits, None).tokens.tolist() == [[5, 3]]
    chosen = chooser.on_host(logits, sampling(1, ends=(5,), top_k=2, temperature=2.0))
    assert chosen.tokens.tolist() == [[5, 3, 9]]
    assert chosen.proposals is not None
    assert chosen.proposals.tolist() == [[1.0, 0.0, 0.0]]
    greedy = chooser.on_host(logits, sampling(1, sampled=False))
    assert greedy.tokens.tolist() == [[5, 3]]
    assert greedy.proposals is None
