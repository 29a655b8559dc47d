"""What SSD costs a step on the host with vLLM's V2 model runner, beside V1's ``propose()``.

The real speculator, draft's thread, follower and draft engine over a real socket pair; only the
draft model is a table look-up. No vLLM engine runs: texts and slots are set as its runner sets
them. For each case

- ``main thread``: notices of the step and ``propose()``, all that the main thread does;
- ``look-up``: the part of it that a GPU computes, here as torch operations on a CPU (one thread),
  which the main thread waits for. On a GPU the launch of a CUDA graph takes its place.
  ``without text`` is the same with ``backup`` ``"none"``; the default fills up with n-grams;
- ``delay``: from the end of sampling, which is the start of ``propose()``, until the draft has
  received the outcomes.

    python -m benchmarks.critical_path_v2
"""

from __future__ import annotations

import gc
import socket
import statistics
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from vllm import SamplingParams

from benchmarks import critical_path
from benchmarks.table_draft import DEPTH, ROUNDS, VOCABULARY, Draft, join_of, successor
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.draft_thread import DraftThread
from vllm_ssd.target.v2.follower import Follower
from vllm_ssd.target.v2.outcomes import OutcomeReadback, unpack_outcome
from vllm_ssd.target.v2.proposals import Proposals
from vllm_ssd.target.v2.slots import Slots
from vllm_ssd.target.v2.speculator import Drafts, SSDSpeculator
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import TargetBound

CASES = (
    (1, 24, 100, 0.0),
    (1, 24, 8_000, 0.0),
    (32, 24, 100, 0.0),
    (32, 24, 8_000, 0.0),
    (256, 4, 100, 0.0),
    (1, 24, 100, 0.8),
    (32, 24, 100, 0.8),
    (256, 4, 100, 0.8),
)
"""Requests, branches of each (1,024 rows at most in all), the length of their texts, and how many
verifications reject a token. The look-up compares with all 1,024 rows in any case."""
SKIPPED = 20
"""First steps that do not count."""
CPU = torch.device("cpu")
NONE: Any = None


class Target:
    """V2's front-end as the worker builds it, with a runner's request slots.

    Args:
        connection: to the draft.
        requests: how many, one a slot.
        branches: of each.
        context: length of their texts.
    """

    def __init__(
        self,
        connection: socket.socket,
        requests: int,
        branches: int,
        context: int,
    ) -> None:
        self.stats = stats = Stats()
        length = context + 4096
        self.states = states = SimpleNamespace(
            max_num_reqs=requests,
            device=CPU,
            all_token_ids=SimpleNamespace(gpu=torch.zeros(requests, length, dtype=torch.int32)),
            total_len=SimpleNamespace(gpu=torch.full([requests], context, dtype=torch.int32)),
            last_sampled_tokens=torch.zeros(requests, 1, dtype=torch.int64),
        )
        self.texts = states.all_token_ids.gpu.numpy()
        self.lengths = states.total_len.gpu.numpy()
        self.last = states.last_sampled_tokens.numpy()[:, 0]
        trees = DeviceTrees(requests, DEPTH, VOCABULARY, CPU)
        writer, table = TreeWriter(trees), RequestTable(length)
        channel = Channel(connection, TargetBound)
        link: Any = SimpleNamespace(
            channel=channel, failure=None, end=channel.close, wait=lambda timeout: None
        )
        join = join_of(branches, sampled=False)
        client = DraftClient(lambda: link, join, 60.0, stats, table.forget_all, published=writer)
        client.launch()
        thread = self.thread = DraftThread(client, stats, strict=True)
        follower = Follower(client, writer, table, stats)
        self.proposals = Proposals(trees, states, from_text=True)
        self.without_text = Proposals(trees, states, from_text=False)
        drafts = Drafts(
            self.proposals,
            Slots(
                requests, lambda gone, begun: thread.post(lambda: follower.scheduled(gone, begun))
            ),
            OutcomeReadback(
                CPU,
                lambda serials, packed: thread.post(
                    lambda: follower.verified(unpack_outcome(serials, packed))
                ),
                thread.report,
            ),
            thread,
            lambda cut: thread.post(lambda: follower.trimmed(cut)),
        )
        self.speculator = SSDSpeculator(DEPTH, states, stats, drafts)
        self.speculator.serving = True
        self._batch: Any = SimpleNamespace(
            num_reqs=requests,
            idx_mapping=torch.arange(requests),
            idx_mapping_np=np.arange(requests),
        )
        self._names = [f"request-{i}" for i in range(requests)]
        self._slots = {name: i for i, name in enumerate(self._names)}

    def schedule(self, begin: bool = False) -> None:
        """A step begins; its K drafts for each request are verified."""
        parameters = SamplingParams(temperature=0.0, max_tokens=4096, ignore_eos=True)
        new = [
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=self.texts[i, : self.lengths[i]].tolist(),
                prompt_embeds=None,
                mm_features=[],
                lora_request=None,
                sampling_params=parameters,
                prompt_len=int(self.lengths[i]),
                prefill_token_ids=self.texts[i, : self.lengths[i]].tolist(),
            )
            for i, name in enumerate(self._names if begin else [])
        ]
        step: Any = SimpleNamespace(
            finished_req_ids=set(),
            preempted_req_ids=None,
            scheduled_new_reqs=new,
            num_scheduled_tokens=dict.fromkeys(self._names, 1 + DEPTH),
            scheduled_spec_decode_tokens=dict.fromkeys(self._names, [-1] * DEPTH),
        )
        self.speculator.scheduled(step, self._slots)

    def propose(self, sampled: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Right after sampling."""
        return self.speculator.propose(
            self._batch, NONE, NONE, NONE, NONE, sampled, rejected, NONE, NONE, NONE, NONE
        )

    def look_up(self, proposals: Proposals, sampled: torch.Tensor, rejected: torch.Tensor) -> float:
        """Seconds of what the device computes of that, once more."""
        began = time.perf_counter()
        with torch.inference_mode():
            proposals.compute(self._batch.idx_mapping, sampled, rejected)
        return time.perf_counter() - began

    def sample(self, row: int, proposal: list[int], rejects: int) -> int:
        """Verify a proposal: what the model goes on with is accepted, up to a token to reject.

        Returns:
            How many tokens the text goes on with.
        """
        accepted, last = [], int(self.texts[row, self.lengths[row] - 1])
        for token in proposal[:rejects]:
            if token != successor(last):
                break
            accepted.append(last := token)
        choice = int(len(accepted) == rejects < DEPTH)
        tokens = [*accepted, successor(last, choice)]
        begin = self.lengths[row]
        self.texts[row, begin : begin + len(tokens)] = tokens
        self.lengths[row] += len(tokens)
        self.last[row] = tokens[-1]
        return len(tokens)

    def settle(self) -> None:
        """What has arrived is in the arrays."""
        for _ in range(2):  # it reads after what it was asked, and answers in the turn after
            self.thread.ask(lambda: None)


class Measured(NamedTuple):
    """Seconds of each step."""

    main: list[float]
    look_up: list[float]
    without_text: list[float]
    delay: list[float]
    hit_rate: float


def measure(requests: int, branches: int, context: int, rejected: float) -> Measured:
    """Run a case."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    target = Target(ours, requests, branches, context)
    draft = Draft(theirs, requests, branches, context, sampled=False)
    target.settle()
    chance = np.random.default_rng(0)
    target.texts[:, :context] = chance.integers(3, VOCABULARY, (requests, context))
    target.schedule(begin=True)
    while draft.announced < requests:
        draft.hear()
    result = Measured([], [], [], [], 0.0)
    proposals: list[list[int]] = [[] for _ in range(requests)]
    gc.collect()
    gc.freeze()  # as vLLM does: what was loaded before is not searched for garbage
    for _ in range(ROUNDS):
        draft.work()
        target.settle()
        began = time.perf_counter()
        target.schedule()
        noticed = time.perf_counter() - began
        rejects = np.where(
            chance.random(requests) < rejected, chance.integers(0, DEPTH, requests), DEPTH
        )
        counts = [
            target.sample(i, proposal, int(rejects[i])) for i, proposal in enumerate(proposals)
        ]
        sampled = torch.tensor(counts, dtype=torch.int32)
        rejections = torch.tensor(list(map(len, proposals)), dtype=torch.int32) - sampled + 1
        target.settle()
        began = time.perf_counter()
        drafts = target.propose(sampled, rejections)
        result.main.append(noticed + time.perf_counter() - began)
        result.delay.append(draft.hear() - began)
        proposals = drafts.tolist()
        for proposals_of, seconds in (
            (target.proposals, result.look_up),
            (target.without_text, result.without_text),
        ):
            seconds.append(target.look_up(proposals_of, sampled, rejections))
    target.thread.close()
    stats = target.stats
    assert not stats.errors
    return result._replace(hit_rate=stats.hits / stats.look_ups)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table(title=f"medians of a step, K = {DEPTH}, {ROUNDS} steps, torch on a CPU")
    for column in (
        "requests",
        "branches",
        "context",
        "rejected",
        "hit rate",
        "main thread",
        "look-up",
        "without text",
        "the rest",
        "delay",
        "V1",
        "V1: delay",
    ):
        table.add_column(column, justify="right")
    for requests, branches, context, rejected in CASES:
        v2 = measure(requests, branches, context, rejected)
        v1 = critical_path.measure(requests, branches, context, rejected, sampled=False)
        rest = [main - look_up for main, look_up in zip(v2.main, v2.look_up, strict=True)]
        table.add_row(
            str(requests),
            str(branches),
            str(context),
            f"{rejected:.0%}",
            f"{v2.hit_rate:.0%}",
            *map(
                _median,
                (v2.main, v2.look_up, v2.without_text, rest, v2.delay, v1.seconds, v1.delays),
            ),
        )
    Console(width=130).print(table)


def _median(seconds: list[float]) -> str:
    return f"{1e6 * statistics.median(seconds[SKIPPED:]):.0f} µs"


if __name__ == "__main__":
    main()
