"""A long prompt reaches the draft while the target prefills it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.forking import Policy
from vllm_ssd.draft.model import BlockChanges, Choices, Done, Sequences
from vllm_ssd.draft.rows import Rows
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.v1.proposer import SSDProposer
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import (
    PROTOCOL,
    DraftBound,
    Join,
    Ready,
    Start,
    TargetBound,
    Verified,
)

VOCABULARY, DEPTH, BRANCHES, CANDIDATES, BLOCK = 50_000, 4, 8, 8, 32
LENGTH = 100_000
PREFILL_SECONDS = 60.0
"""The most that the prefill may take here; the draft's model takes no time."""


def successor(token: int) -> int:
    """The token that both models choose after a token."""
    return (token * 31 + 7) % VOCABULARY


class TableModel:
    """A draft model whose next token is a function of the last one."""

    lookahead = False
    graph_steps = 0

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Done:
        last = sequences.tokens[np.cumsum(sequences.query_lens) - 1].astype(np.int64)
        top = (last[:, None] * 31 + np.arange(CANDIDATES) * 101 + 7) % VOCABULARY
        shares = np.full(top.shape, 1.0 / CANDIDATES, np.float32)
        return Done(Choices.firsts(top.astype(np.int32), shares))


class Draft:
    """The draft's side of the channel: a real engine in a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.drafted = threading.Event()
        """It has read the prompt and drafted all it can for it."""
        self._channel: Channel[DraftBound] = Channel(connection, DraftBound)
        self._number = 0
        self._stopped = False
        blocks = -(-(LENGTH + 100) // BLOCK)
        self._engine = DraftEngine(
            TableModel(),
            Rows(BRANCHES, DEPTH, CANDIDATES),
            KVBlocks(blocks + 3 * BRANCHES, BLOCK, enable_prefix_caching=True),
            prefill_chunk=2_000,
            prefill_chunk_idle=2_000,
        )
        self._session = self._engine.open(Policy(DEPTH, None, BRANCHES, BRANCHES))
        self._send([Ready(BRANCHES, blocks, BLOCK)], epoch=1)
        self._thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join()
        self._channel.close()

    def _serve(self) -> None:
        while not self._stopped:
            for frame in self._channel.receive(0.05):
                assert frame is not None
                if isinstance(frame.messages[0], Join):
                    continue
                for message in frame.messages:
                    if isinstance(message, Start | Verified):
                        self._session.handle(message)
                self._send(self._session.publications(), frame.epoch)
                while self._engine.has_work:
                    self._engine.step()
                    self._send(self._session.publications(), frame.epoch)
                self.drafted.set()

    def _send(self, messages: list[Any], epoch: int) -> None:
        self._channel.send(TargetBound(epoch, self._number, messages))
        self._number += 1


@pytest.fixture
def draft() -> Iterator[tuple[Draft, SSDProposer]]:
    """A draft, and a proposer that is connected to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options: dict[str, Any] = {"model": "table", "num_speculative_tokens": DEPTH, "strict": True}
    options["draft_sampling"] = "greedy"
    config: Any = SimpleNamespace(
        additional_config={"ssd": options}, model_config=SimpleNamespace(max_model_len=LENGTH + 100)
    )
    proposer = SSDProposer(config)
    channel = Channel(ours, TargetBound)
    link: Any = SimpleNamespace(channel=channel, failure=None)
    join = Join(PROTOCOL, "", VOCABULARY, DEPTH, [], BRANCHES, BRANCHES)
    rounds = proposer.rounds
    client = DraftClient(lambda: link, join, 60.0, rounds.stats, rounds.requests.forget_all)
    client.launch()
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]), requests={})
    proposer.bind(runner, client)
    drafting = Draft(theirs)
    client.poll(1.0)
    assert client.up
    yield drafting, proposer
    drafting.stop()
    channel.close()


def test_a_long_prompt_is_drafted_for_at_its_first_look_up(
    draft: tuple[Draft, SSDProposer],
) -> None:
    drafting, proposer = draft
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, LENGTH).tolist()
    request = SimpleNamespace(
        req_id="a",
        prompt_token_ids=prompt,
        prompt_embeds=None,
        mm_features=[],
        lora_request=None,
        sampling_params=SamplingParams(max_tokens=50),
    )
    step: Any = SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[request],
        num_scheduled_tokens={"a": LENGTH},
        scheduled_spec_decode_tokens={},
    )
    began = time.monotonic()
    proposer.scheduled(step)
    assert time.monotonic() - began < 1.0
    # Until now the draft was in the middle of a step. The target prefills: nothing calls the
    # client meanwhile.
    drafting.start()
    assert drafting.drafted.wait(PREFILL_SECONDS)

    first = successor(prompt[-1])
    texts = np.zeros((1, LENGTH + 100), np.int32)
    texts[0, : LENGTH + 1] = [*prompt, first]
    (proposal,) = proposer.propose([[first]], np.array([LENGTH + 1], np.int32), texts)
    expected = [first]
    for _ in range(DEPTH):
        expected.append(successor(expected[-1]))
    assert proposal == expected[1:]
    stats = proposer.rounds.stats
    assert (stats.first_look_ups, stats.first_hits) == (1, 1)
