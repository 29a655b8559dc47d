"""The two host-side costs of SSD: ``propose()`` on hits, and the draft's own Python per step.

The real proposer, client, cache and draft engine over a real socket pair; only the draft model is
replaced by a table look-up, so that look-ups hit and no model time is measured. The draft runs
between two proposals and is not timed as part of them. Greedy batches are those of a draft that may
sample (``draft_sampling`` ``"auto"``, the default).

    python benchmarks/critical_path.py
"""

from __future__ import annotations

import gc
import socket
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from vllm import SamplingParams

from vllm_ssd.core.arms import arms_of
from vllm_ssd.core.switch import Switch
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.forking import Policy
from vllm_ssd.draft.model import BlockChanges, Choices, Done, Sequences
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.session import Session
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import LookUp
from vllm_ssd.target.steps import Decodes
from vllm_ssd.target.v1.handover import HandOver
from vllm_ssd.target.v1.proposer import SSDProposer
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
CASES = (
    (1, 24, 100, 0.0, False),
    (1, 24, 8_000, 0.0, False),
    (32, 24, 100, 0.0, False),
    (32, 24, 8_000, 0.0, False),
    (64, 16, 100, 0.0, False),
    (256, 4, 100, 0.0, False),
    (1, 24, 100, 0.8, False),
    (32, 24, 100, 0.8, False),
    (256, 4, 100, 0.8, False),
    (1, 24, 100, 0.0, True),
    (32, 24, 100, 0.0, True),
    (1, 24, 100, 0.8, True),
    (32, 24, 100, 0.8, True),
)
"""Requests, branches of each (1,024 rows at most in all), the length of their texts, how many
verifications reject a token (the target's token is then the draft's second choice), and whether
tokens are sampled: then their distributions are handed over to the runner."""
CANDIDATES = 25
SAMPLED_FROM = 64
ROUNDS = 200
BLOCK = 32


class TableModel:
    """A draft "model" whose next token is a function of the last one."""

    lookahead = False
    graph_steps = 0
    _shares = np.full((1, CANDIDATES), 0.5 / (CANDIDATES - 1), np.float32)
    _q = np.full((1, SAMPLED_FROM), 0.5 / (SAMPLED_FROM - 1), np.float32)
    _shares[0, 0] = _q[0, 0] = 0.5

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Done:
        """The best tokens after each sequence: its last token's successor, then others."""
        last = sequences.tokens[np.cumsum(sequences.query_lens) - 1].astype(np.int64)
        sampling = sequences.sampling
        count = CANDIDATES if sampling is None else SAMPLED_FROM
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


class AlwaysOn(Decisions):
    """What is measured is speculation at full depth, not whether and how much of it pays here."""

    def decide(self, switch: Switch) -> bool:
        return True

    def choose(self, look_ups: Sequence[LookUp]) -> None:
        super().choose(look_ups)
        for each in look_ups:
            each.chosen = DEPTH


class Draft:
    """The draft's side of the socket, driven by hand."""

    def __init__(
        self, connection: socket.socket, requests: int, branches: int, context: int, sampled: bool
    ) -> None:
        self._channel: Channel[DraftBound] = Channel(connection, DraftBound)
        self._epoch, self._number = 1, 0
        blocks = -(-(context + 4096) // BLOCK)
        rows = requests * branches
        self.engine = DraftEngine(
            TableModel(),
            Rows(rows, DEPTH, CANDIDATES, SAMPLED_FROM),
            KVBlocks(requests * blocks + 3 * rows, BLOCK, enable_prefix_caching=True),
            prefill_chunk=100_000,
            prefill_chunk_idle=100_000,
        )
        arms = arms_of(_sampling(sampled), 1.0)
        self.session = self.engine.open(Policy(DEPTH, None, branches, branches, arms))
        self._send([Ready(rows, 0, BLOCK)])

    def turn(self) -> None:
        """Read everything, then decode until nothing is left to do."""
        for frame in self._channel.receive(1.0):
            assert frame is not None
            self._epoch = frame.epoch
            for message in frame.messages:
                if isinstance(message, Start | Verified | Trimmed):
                    self.session.handle(message)
        self._send(self.session.publications())
        while self.engine.has_work:
            self.engine.step()
            self._send(self.session.publications())

    def _send(self, messages: list[ToTarget]) -> None:
        self._channel.send(TargetBound(self._epoch, self._number, messages))
        self._number += 1


def _sampling(sampled: bool) -> str:
    """The option ``draft_sampling``."""
    return "probabilistic" if sampled else "auto"


def measure(
    requests: int, branches: int, context: int, rejected: float, sampled: bool
) -> tuple[list[float], Session, float]:
    """Seconds of each ``propose()``, the draft's session, and the share of look-ups that hit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    proposer, client = _proposer(ours, branches, context, sampled)
    texts = np.zeros((requests, context + 4096), np.int32)
    lengths = np.full(requests, context, np.int32)
    chance = np.random.default_rng(0)
    texts[:, :context] = chance.integers(3, VOCABULARY, (requests, context))
    draft = Draft(theirs, requests, branches, context, sampled)
    client.poll(1.0)
    names = [f"request-{i}" for i in range(requests)]
    parameters = SamplingParams(temperature=float(sampled), max_tokens=4096, ignore_eos=True)
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=names, all_greedy=not sampled),
        requests={},
        device="cpu",
    )
    rounds = proposer.rounds
    proposer.bind(runner, client, HandOver(runner, DEPTH, VOCABULARY, requests, rounds.stats))
    announced = [
        rounds.requests.announce(name, texts[i, :context], context, parameters)
        for i, name in enumerate(names)
    ]
    client.send(list(announced))
    assert client.link is not None
    assert client.link.channel is not None
    while not client.link.channel.flush():
        draft.turn()
    proposals: list[list[int]] = [[] for _ in names]
    seconds: list[float] = []
    gc.collect()
    gc.freeze()  # as vLLM does: what was loaded before is not searched for garbage
    for _ in range(ROUNDS):
        draft.turn()
        verified = []
        for i, proposal in enumerate(proposals):
            rejects = chance.random() < rejected
            # Else everything is accepted, and the target's next token is the draft's.
            accepted = proposal[: int(chance.integers(DEPTH))] if rejects else proposal
            last = accepted[-1] if accepted else int(texts[i, lengths[i] - 1])
            tokens = [*accepted, successor(last, choice=int(rejects))]
            texts[i, lengths[i] : lengths[i] + len(tokens)] = tokens
            lengths[i] += len(tokens)
            verified.append(tokens)
        rounds.decisions.take_in()
        rounds.pace.scheduled(Decodes(requests, sum(map(len, proposals))))
        began = time.perf_counter()
        proposals = proposer.propose(verified, lengths, texts)
        seconds.append(time.perf_counter() - began)
    return seconds, draft.session, rounds.stats.hits / rounds.stats.look_ups


def _proposer(
    connection: socket.socket, branches: int, context: int, sampled: bool
) -> tuple[SSDProposer, DraftClient]:
    options: dict[str, Any] = {"model": "table", "num_speculative_tokens": DEPTH, "strict": True}
    options |= {"draft_sampling": _sampling(sampled), "draft_top_n": SAMPLED_FROM}
    options["max_wait_ms"] = 0.0  # the draft runs between two proposals only
    config: Any = SimpleNamespace(
        additional_config={"ssd": options},
        model_config=SimpleNamespace(max_model_len=context + 4096),
    )
    proposer = SSDProposer(config)
    rounds = proposer.rounds
    rounds.decisions = AlwaysOn(rounds.requests, rounds.pace, rounds.stats)
    sampling = _sampling(sampled), SAMPLED_FROM
    join = Join(PROTOCOL, "", VOCABULARY, DEPTH, [], branches, branches, *sampling)
    link: Any = SimpleNamespace(channel=Channel(connection, TargetBound), failure=None)
    client = DraftClient(lambda: link, join, 60.0, rounds.stats, rounds.requests.forget_all)
    client.launch()
    return proposer, client


def main() -> None:
    """Print both tables."""
    table = Table(title=f"propose(), K = {DEPTH}, {ROUNDS} rounds")
    for column in (
        "requests",
        "branches",
        "context",
        "rejected",
        "sampled",
        "hit rate",
        "10 %",
        "median",
        "99 %",
    ):
        table.add_column(column, justify="right")
    steps = Table(title="the draft's Python beside the model's forward, means")
    for column in ("rows", "context", "rejected", "sampled", "per step", "from outcomes to forks"):
        steps.add_column(column, justify="right")
    for requests, branches, context, rejected, sampled in CASES:
        seconds, session, hit_rate = measure(requests, branches, context, rejected, sampled)
        microseconds = sorted(1e6 * s for s in seconds[20:])
        table.add_row(
            str(requests),
            str(branches),
            str(context),
            f"{rejected:.0%}",
            "yes" if sampled else "no",
            f"{hit_rate:.1%}",
            f"{microseconds[len(microseconds) // 10]:.0f} µs",
            f"{statistics.median(microseconds):.0f} µs",
            f"{microseconds[int(0.99 * len(microseconds))]:.0f} µs",
        )
        counters = session.counters
        steps.add_row(
            f"{counters['draft_rows'] / counters['draft_steps']:.1f}",
            str(context),
            f"{rejected:.0%}",
            "yes" if sampled else "no",
            f"{1e3 * counters['draft_python_seconds'] / counters['draft_steps']:.2f} ms",
            f"{1e3 * counters['draft_plan_seconds'] / counters['draft_rounds']:.2f} ms",
        )
    console = Console(width=110)
    console.print(table)
    console.print(steps)


if __name__ == "__main__":
    main()
