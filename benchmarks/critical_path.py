"""The two host-side costs of SSD: ``propose()`` on hits, and the draft's own Python per step.

The real proposer, client, cache and draft engine over a real socket pair; only the draft model is
replaced by a table look-up, so that look-ups hit and no model time is measured. The draft runs
between two proposals and is not timed as part of them. Greedy batches are those of a draft that may
sample (``draft_sampling`` ``"auto"``, the default).

    python -m benchmarks.critical_path
"""

from __future__ import annotations

import gc
import socket
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from vllm import SamplingParams

from benchmarks.table_draft import (
    DEPTH,
    ROUNDS,
    SAMPLED_FROM,
    VOCABULARY,
    Draft,
    join_of,
    sampling_option,
    successor,
)
from vllm_ssd.core.switch import Switch
from vllm_ssd.draft.session import Session
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import LookUp
from vllm_ssd.target.steps import Decodes
from vllm_ssd.target.v1.handover import HandOver
from vllm_ssd.target.v1.proposer import SSDProposer
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import TargetBound

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


class AlwaysOn(Decisions):
    """What is measured is speculation at full depth, not whether and how much of it pays here."""

    def decide(self, switch: Switch) -> bool:
        return True

    def choose(self, look_ups: Sequence[LookUp]) -> None:
        super().choose(look_ups)
        for each in look_ups:
            each.chosen = DEPTH


class Measured(NamedTuple):
    """What came of a case."""

    seconds: list[float]
    """Of each ``propose()``."""
    delays: list[float]
    """Seconds from the start of each until the draft has its outcomes."""
    session: Session
    """The draft's."""
    hit_rate: float


def measure(requests: int, branches: int, context: int, rejected: float, sampled: bool) -> Measured:
    """Run a case."""
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
    delays: list[float] = []
    gc.collect()
    gc.freeze()  # as vLLM does: what was loaded before is not searched for garbage
    draft.hear()
    for _ in range(ROUNDS):
        draft.work()
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
        delays.append(draft.hear() - began)
    hit_rate = rounds.stats.hits / rounds.stats.look_ups
    return Measured(seconds, delays, draft.session, hit_rate)


def _proposer(
    connection: socket.socket, branches: int, context: int, sampled: bool
) -> tuple[SSDProposer, DraftClient]:
    options: dict[str, Any] = {"model": "table", "num_speculative_tokens": DEPTH, "strict": True}
    options |= {"draft_sampling": sampling_option(sampled), "draft_top_n": SAMPLED_FROM}
    options["max_wait_ms"] = 0.0  # the draft runs between two proposals only
    config: Any = SimpleNamespace(
        additional_config={"ssd": options},
        model_config=SimpleNamespace(max_model_len=context + 4096),
    )
    proposer = SSDProposer(config)
    rounds = proposer.rounds
    rounds.decisions = AlwaysOn(rounds.requests, rounds.pace, rounds.stats)
    link: Any = SimpleNamespace(channel=Channel(connection, TargetBound), failure=None)
    client = DraftClient(
        lambda: link, join_of(branches, sampled), 60.0, rounds.stats, rounds.requests.forget_all
    )
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
        measured = measure(requests, branches, context, rejected, sampled)
        microseconds = sorted(1e6 * s for s in measured.seconds[20:])
        table.add_row(
            str(requests),
            str(branches),
            str(context),
            f"{rejected:.0%}",
            "yes" if sampled else "no",
            f"{measured.hit_rate:.1%}",
            f"{microseconds[len(microseconds) // 10]:.0f} µs",
            f"{statistics.median(microseconds):.0f} µs",
            f"{microseconds[int(0.99 * len(microseconds))]:.0f} µs",
        )
        counters = measured.session.counters
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
