"""A steady load of streamed greedy requests to a server, and what each of them came to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai

from tests.robustness.serving import Server, stats_of

CLIENTS = 4
POLL_SECONDS = 0.25
"""Between two looks at the plugin's counters."""
ANSWER_SECONDS = 120.0
"""A stream that is silent for so long is lost."""


@dataclass(frozen=True)
class Ended:
    """A request that has ended."""

    at: float
    """``time.monotonic()``."""
    different: bool
    """Its text is not the expected one."""
    lost: str
    """Why it has no whole answer; empty if it has."""


@dataclass(frozen=True)
class Pace:
    """How fast texts arrive."""

    tokens_per_second: float
    """Of all streams together."""
    median: float
    """Of the pauses between two pieces of a stream, in milliseconds; a piece has the tokens of one
    step of the engine."""
    tail: float
    """99 % of the pauses were shorter."""
    longest: float

    def __str__(self) -> str:
        """The pauses, for a table."""
        return f"{self.median:.0f} / {self.tail:.0f} / {self.longest:.0f}"


@dataclass(frozen=True)
class _Piece:
    at: float
    tokens: int
    pause: float | None
    """Seconds since the piece before it; None for the first one."""


class Streams:
    """Clients that ask for one text after the other, and note when each piece arrives.

    Args:
        server: who answers.
        prompts: token prompts, asked for in turn.
        expected: the right answers; all of one length.
    """

    def __init__(
        self, server: Server, prompts: Sequence[list[int]], expected: Sequence[list[int]]
    ) -> None:
        self.ended: list[Ended] = []
        self._server = server
        self._client = server.client.with_options(timeout=ANSWER_SECONDS)
        self._prompts = prompts
        self._expected = expected
        self._pieces: list[_Piece] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(first,), daemon=True)
            for first in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the requests end that are under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def pace(self, begin: float, end: float) -> Pace:
        """That between two times of ``time.monotonic()``."""
        pieces = [piece for piece in list(self._pieces) if begin <= piece.at < end]
        rate = sum(piece.tokens for piece in pieces) / (end - begin)
        pauses = [1e3 * piece.pause for piece in pieces if piece.pause is not None]
        if not pauses:
            return Pace(rate, *[float("nan")] * 3)
        return Pace(rate, float(np.median(pauses)), float(np.percentile(pauses, 99)), max(pauses))

    def _ask(self, which: int) -> None:
        while not self._stop.is_set():
            lost, said = "", []
            try:
                said = self._stream(self._prompts[which])
            except openai.OpenAIError as error:
                lost = repr(error)
                self._stop.wait(1.0)
            expected = self._expected[which]
            if not lost and len(said) < len(expected):
                lost = f"ended after {len(said)} tokens"
            different = said != expected[: len(said)]
            self.ended.append(Ended(time.monotonic(), different, lost))
            which = (which + CLIENTS + 1) % len(self._prompts)

    def _stream(self, prompt: list[int]) -> list[int]:
        answer: Any = self._client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=len(self._expected[0]),
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        said: list[int] = []
        before: float | None = None
        for chunk in answer:
            if chunk.choices and (tokens := chunk.choices[0].token_ids):
                now = time.monotonic()
                pause = None if before is None else now - before
                self._pieces.append(_Piece(now, len(tokens), pause))
                before = now
                said += tokens
        return said


class Hits:
    """Looks at a server's counters now and then."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: list[tuple[float, dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    @property
    def newest(self) -> dict[str, float]:
        """The counters as last seen."""
        return self._seen[-1][1] if self._seen else {}

    @property
    def step_seconds(self) -> float:
        """What a step of the draft has taken on average so far."""
        return self.newest["draft_step_seconds"] / self.newest["draft_steps"]

    def rate(self, begin: float, end: float) -> float:
        """Of the look-ups in between; 0 without any."""
        seen = [counters for at, counters in list(self._seen) if begin <= at <= end]
        return _rate(seen[0], seen[-1]) if len(seen) > 1 else 0.0

    def back_at(self, since: float, rate: float) -> float | None:
        """When look-ups hit that often again; None if not yet."""
        seen = [one for one in list(self._seen) if one[0] >= since]
        for (_, before), (at, counters) in itertools.pairwise(seen):
            if _rate(before, counters) >= rate:
                return at
        return None

    def _look(self) -> None:
        while not self._stop.is_set():
            counters = stats_of(self._server)
            self._seen.append((time.monotonic(), counters))
            self._stop.wait(POLL_SECONDS)


def _rate(before: dict[str, float], after: dict[str, float]) -> float:
    look_ups = after["look_ups"] - before["look_ups"]
    return (after["hits"] - before["hits"]) / look_ups if look_ups else 0.0
