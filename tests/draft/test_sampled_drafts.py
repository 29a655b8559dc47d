"""Drafts of requests with a temperature: sampled from q', once, and verified exactly."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.draft.simulation import Simulation, Sizes, TargetRequest
from tests.draft.toy_model import best_tokens, stated, toy_q

PROMPT = [3, 1, 4, 1, 5, 2]
VOCABULARY = 6
STOP = [best_tokens(PROMPT, VOCABULARY, VOCABULARY)[2]]
ANSWERS = 1200
TOKENS = 3
"""How many tokens of each answer are looked at."""


def target(text: list[int], temperature: float) -> NDArray[np.float64]:
    """What the target emits after a text: partly what the draft expects, partly something else."""
    order = best_tokens(text, VOCABULARY, VOCABULARY)
    p = np.zeros(VOCABULARY)
    p[order] = stated(np.array([0.5]), VOCABULARY)[0].astype(np.float64) ** (1.0 / temperature)
    p /= p.sum()
    other = np.zeros(VOCABULARY)
    other[best_tokens([*text, 0], VOCABULARY, VOCABULARY)] = 0.6 ** np.arange(VOCABULARY)
    return 0.6 * p + 0.4 * other / other.sum()


class Target:
    """A target that verifies as vLLM's rejection sampler does.

    Args:
        seed: of its random numbers.
        forgets: a mistake: what it takes a sampled token's q' for.
    """

    def __init__(self, seed: int, forgets: str = "") -> None:
        self._rng = np.random.default_rng(seed)
        self._forgets = forgets
        self.accepted = self.drafted = self.sampled = self.hits = self.look_ups = 0

    def verify(self, sim: Simulation, request: TargetRequest) -> None:
        """One verification of what was proposed."""
        rng, start = self._rng, len(request.text)
        self.look_ups += 1
        self.hits += bool(request.proposed)
        for i, token in enumerate(request.proposed[: request.verifying]):
            text = request.text + request.proposed[:i]
            p = target(text, request.temperature)
            drawn_from = sim.drawn_from.get((request.row, start + i))
            if self._forgets == "q'":
                drawn_from = None
            elif self._forgets == "end tokens" and drawn_from is not None:
                q = toy_q(text, VOCABULARY, 0.5, VOCABULARY, VOCABULARY, request.temperature)
                drawn_from = dict(enumerate(q.tolist()))
            elif self._forgets == "temperature" and drawn_from is not None:
                q = toy_q(text, VOCABULARY, 0.5, VOCABULARY, VOCABULARY, 1.0, stop=request.stop)
                drawn_from = dict(enumerate(q.tolist()))
            self.drafted += 1
            self.sampled += drawn_from is not None
            q = np.zeros(VOCABULARY)
            for of, share in (drawn_from or {token: 1.0}).items():
                q[of] = share
            if rng.random() < p[token] / q[token]:
                self.accepted += 1
                continue
            left = np.maximum(p - q, 0.0)
            sim.confirm(request, i, int(rng.choice(VOCABULARY, p=left / left.sum())))
            return
        p = target(request.text + request.proposed[: request.verifying], request.temperature)
        sim.confirm(request, request.verifying, int(rng.choice(VOCABULARY, p=p)))


def answers(
    sizes: Sizes, target_: Target, temperature: float, count: int, stop: list[int]
) -> Counter[tuple[int, ...]]:
    """The first tokens of many answers, drafted for side by side, with steps that come as they do.

    An answer ends with its end token.
    """
    sim = Simulation(sizes)
    rng = np.random.default_rng(1)
    found: Counter[tuple[int, ...]] = Counter()
    live: list[TargetRequest] = []
    started = 0
    while started < count or live:
        while len(live) < 12 and started < count:
            live.append(sim.start(PROMPT, 14, stop, temperature))
            started += 1
        sim.deliver()
        for _ in range(int(rng.choice([2, 4, 6, 9]))):
            sim.draft_steps()
        sim.target_receives(int(rng.choice([9, 99])))
        for request in live:
            target_.verify(sim, request)
        sim.propose([request for request in live if not request.over])
        done = [r for r in live if r.over or len(r.text) >= len(PROMPT) + TOKENS + 4]
        for request in done:
            answer = request.text[len(PROMPT) :]
            end = next((i + 1 for i, t in enumerate(answer) if t in stop), len(answer))
            found[tuple(answer[: min(end, TOKENS)])] += 1
        if done:
            sim.finish(done)
        live = [request for request in live if request not in done]
    return found


def surprise(found: Counter[tuple[int, ...]], temperature: float, stop: list[int]) -> float:
    """How far the answers are from the target's own distribution: (chi2 - df) / sqrt(2 df)."""
    expected: Counter[tuple[int, ...]] = Counter()
    for answer in itertools.product(range(VOCABULARY), repeat=TOKENS):
        chance, text = 1.0, list(PROMPT)
        for token in answer:
            chance *= float(target(text, temperature)[token])
            text.append(token)
            if token in stop:
                break
        expected[tuple(text[len(PROMPT) :])] = chance  # type: ignore[assignment]
    total = sum(found.values())
    assert sum(expected.values()) == pytest.approx(1.0)
    chi2 = sum((found[a] - total * c) ** 2 / (total * c) for a, c in expected.items())
    freedom = len(expected) - 1
    return (chi2 - freedom) / (2.0 * freedom) ** 0.5


SIZES = Sizes(vocab_size=VOCABULARY, max_rows=200, num_blocks=800, sampled_from=VOCABULARY)


@pytest.mark.parametrize(
    ("temperature", "sampling", "saguaro_c", "lookahead"),
    [
        (1.0, "probabilistic", 1.0, False),
        (0.6, "probabilistic", 1.0, True),
        pytest.param(0.5, "probabilistic", 0.3, True, marks=pytest.mark.slow),
        pytest.param(1.5, "probabilistic", 0.0, False, marks=pytest.mark.slow),
        (0.7, "auto", -1.0, True),
        pytest.param(1.0, "greedy", 1.0, False, marks=pytest.mark.slow),
    ],
)
def test_answers_are_distributed_as_the_targets_own(
    temperature: float, sampling: str, saguaro_c: float, lookahead: bool
) -> None:
    sizes = SIZES._replace(sampling=sampling, saguaro_c=saguaro_c, lookahead=lookahead)
    verifier = Target(seed=5)
    found = answers(sizes, verifier, temperature, ANSWERS, STOP)
    assert surprise(found, temperature, STOP) < 3.5
    assert verifier.hits > 0.3 * verifier.look_ups
    assert verifier.accepted > 0.3 * verifier.drafted
    assert (verifier.sampled > 0.3 * verifier.drafted) == (sampling != "greedy")


@pytest.mark.parametrize("forgets", ["q'", "temperature", "end tokens"])
def test_a_wrong_q_shows_in_the_answers(forgets: str) -> None:
    # Verified by another distribution than the tokens were sampled from.
    found = answers(SIZES, Target(seed=5, forgets=forgets), 0.6, ANSWERS, STOP)
    if forgets == "q'":  # still exact: a certain proposal may be any
        assert surprise(found, 0.6, STOP) < 3.5
    else:
        assert surprise(found, 0.6, STOP) > 5.0
