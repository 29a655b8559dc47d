"""A draft whose "model" is a table look-up, for ``critical_path.py`` and ``critical_path_v2.py``.

The real draft engine at the other end of a real socket pair, driven by hand: look-ups hit, and no
model time is measured.
"""

from __future__ import annotations

import socket
import time

import numpy as np

from vllm_ssd.core.arms import arms_of
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.forking import Policy
from vllm_ssd.draft.model import BlockChanges, Choices, Done, Sequences
from vllm_ssd.draft.rows import Rows
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import (
    PROTOCOL,
    DraftBound,
    Join,
    Ready,
    Start,
    TargetBound,
    ToTarget,
    Trimmed,
    Verified,
)

VOCABULARY = 49_152
DEPTH = 6
SAMPLED_FROM = 64
ROUNDS = 200
_CANDIDATES = 25
_BLOCK = 32


class TableModel:
    """A draft "model" whose next token is a function of the last one."""

    lookahead = False
    graph_steps = 0
    _shares = np.full((1, _CANDIDATES), 0.5 / (_CANDIDATES - 1), np.float32)
    _q = np.full((1, SAMPLED_FROM), 0.5 / (SAMPLED_FROM - 1), np.float32)
    _shares[0, 0] = _q[0, 0] = 0.5

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Done:
        """The best tokens after each sequence: its last token's successor, then others."""
        last = sequences.tokens[np.cumsum(sequences.query_lens) - 1].astype(np.int64)
        sampling = sequences.sampling
        count = _CANDIDATES if sampling is None else SAMPLED_FROM
        top = (last[:, None] * 31 + np.arange(count) * 101 + 7) % VOCABULARY
        choices = Choices.firsts(top.astype(np.int32), np.repeat(self._shares, len(last), axis=0))
        if sampling is None:
            return Done(choices)
        # Every sample happens to be the first choice.
        q = np.where(sampling.sampled[:, None], self._q, np.eye(1, SAMPLED_FROM, dtype=np.float32))
        return Done(choices._replace(proposals=q))


def successor(token: int, choice: int = 0) -> int:
    """The model's token after ``token``, and so the simulated target's; or another choice."""
    return (token * 31 + choice * 101 + 7) % VOCABULARY


class Draft:
    """The draft's side of the socket, driven by hand."""

    def __init__(
        self, connection: socket.socket, requests: int, branches: int, context: int, sampled: bool
    ) -> None:
        self._channel: Channel[DraftBound] = Channel(connection, DraftBound)
        self._epoch, self._number = 1, 0
        self.announced = 0
        """Requests."""
        blocks = -(-(context + 4096) // _BLOCK)
        rows = requests * branches
        self.engine = DraftEngine(
            TableModel(),
            Rows(rows, DEPTH, _CANDIDATES, SAMPLED_FROM),
            KVBlocks(requests * blocks + 3 * rows, _BLOCK, enable_prefix_caching=True),
            prefill_chunk=100_000,
            prefill_chunk_idle=100_000,
        )
        arms = arms_of(sampling_option(sampled), 1.0)
        self.session = self.engine.open(Policy(DEPTH, None, branches, branches, arms))
        self._send([Ready(rows, 0, _BLOCK)])

    def turn(self) -> None:
        """Read everything, then decode until nothing is left to do."""
        self.hear()
        self.work()

    def hear(self) -> float:
        """Read what the target has sent; when it was there."""
        frames = self._channel.receive(1.0)
        heard_at = time.perf_counter()
        for frame in frames:
            assert frame is not None
            self._epoch = frame.epoch
            for message in frame.messages:
                if isinstance(message, Start | Verified | Trimmed):
                    self.session.handle(message)
                    self.announced += isinstance(message, Start)
        return heard_at

    def work(self) -> None:
        """Decode until nothing is left to do."""
        self._send(self.session.publications())
        while self.engine.has_work:
            self.engine.step()
            self._send(self.session.publications())

    def _send(self, messages: list[ToTarget]) -> None:
        self._channel.send(TargetBound(self._epoch, self._number, messages))
        self._number += 1


def sampling_option(sampled: bool) -> str:
    """The option ``draft_sampling``."""
    return "probabilistic" if sampled else "auto"


def join_of(branches: int, sampled: bool) -> Join:
    """How a target joins this draft."""
    sampling = sampling_option(sampled), SAMPLED_FROM
    return Join(PROTOCOL, "", VOCABULARY, DEPTH, [], branches, branches, *sampling)
