"""The target's round: what it tells the draft, and what is left where it ends early."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from vllm_ssd.config import SSDConfig
from vllm_ssd.target.lookup import Batch
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.rounds import Rounds
from vllm_ssd.target.sources import Sources
from vllm_ssd.target.steps import Decodes, EngineRequest, Scheduled
from vllm_ssd.wire.messages import Ready, Verified

PROMPT = [5, 6, 7, 8]
DECODES = Decodes(1, 0)


class Client:
    """As much of the client as a round uses, with a draft that is up and finds nothing."""

    up = True
    epoch = received = 0

    def __init__(self) -> None:
        self.published = PublishedTrees(3, 100)
        self.published.start(Ready(8, 8, 8))
        self.sent: list[Any] = []

    def poll(self, timeout: float = 0.0) -> None:
        """Nothing comes."""

    def maintain(self) -> None:
        """Nothing is wrong."""

    def send(self, messages: list[Any]) -> None:
        self.sent += messages


class Target:
    """A target with one request."""

    def __init__(self) -> None:
        config = SSDConfig.parse({"model": "d", "num_speculative_tokens": 3, "strict": True})
        self.rounds, self.client = Rounds(config, 64), Client()
        client: Any = self.client
        self.rounds.connect(client, lambda req_id, text: None)
        request = EngineRequest("a", PROMPT, len(PROMPT), SamplingParams(max_tokens=40))
        self.rounds.scheduled(Scheduled([], [request], [], None))
        self.text = list(PROMPT)
        self._now = 0.0
        self.decode(0.1)

    def decode(self, seconds: float) -> list[Any]:
        """A step that took so long has ended: one round. What it tells the draft."""
        self.text.append(9)
        self.client.sent.clear()
        texts = np.array([self.text], np.int32)
        batch = Batch(["a"], [[9]], [len(self.text)], texts)
        rounds = self.rounds
        if rounds._proposed_at is not None:
            self._now = rounds._proposed_at + seconds
        rounds.propose(batch, self._now, samples=True)
        rounds.proposed(self._now)
        return [message for message in self.client.sent if isinstance(message, Verified)]


@pytest.mark.parametrize(("decodes", "told"), [(DECODES, True), (None, False)])
def test_a_step_with_a_prefill_is_no_usual_verification(
    decodes: Decodes | None, told: bool
) -> None:
    target = Target()
    target.rounds.scheduled(Scheduled([], [], [], decodes))
    (message,) = target.decode(0.05)
    assert message.verify_us == pytest.approx(50_000 if told else 0, rel=0.1)
    # Our own counters are of all steps.
    assert target.rounds.stats.verify_seconds == pytest.approx(0.05, rel=0.1)


def test_nothing_is_left_of_a_round_that_a_new_epoch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target()
    rounds, waiting = target.rounds, target.rounds._waiting
    rounds.scheduled(Scheduled([], [], [], DECODES))

    def begin(short: list[Any], client: Any) -> list[Any]:
        # Another request was answered at once, with sampled tokens.
        nothing: Any = None
        rounds.sources.append(Sources(nothing, nothing, nothing, nothing, nothing))
        for each in short:
            each.before = each.below
        return short

    monkeypatch.setattr(waiting, "begin", begin)
    monkeypatch.setattr(waiting, "wait", lambda *_: False)
    target.decode(0.05)
    assert rounds.sources == []
    assert rounds.stats.misses_resync == 1
