"""How each request is drafted for: its temperature, and the arm it keeps for some verifications."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from vllm_ssd.core.arms import LEVELS, Arm, BestArm, Block, Settings, level_of
from vllm_ssd.core.arrays import Float64Array
from vllm_ssd.core.step_times import level_of as level_of_batch
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.sampled_rows import SampledRows

_FORKS_AT_FIRST = 2.0
"""Forks of a position, until some were counted."""
_SMOOTHING = 0.02
"""Weight of one request's newest forks, and of the newest verification's time."""


class Drafting:
    """Chooses arms, and has the rows draft accordingly.

    What is chosen depends on verified tokens only, never on samples that are yet to be verified.

    Args:
        rows: what the rows know of sampling.
        arms: the ways to draft above temperature 0.
        num_speculative_tokens: K.
        counters: counters to keep.
    """

    def __init__(
        self,
        rows: SampledRows,
        arms: Sequence[Arm],
        num_speculative_tokens: int,
        counters: dict[str, float],
    ) -> None:
        self.settings = Settings(arms)
        self._rows = rows
        self._counters = counters
        self._best = [BestArm(len(arms), os.urandom(16).hex()) for _ in range(LEVELS)]
        self._usual_seconds: dict[int, float] = {}
        """What a verification takes, smoothed, by the level of the batch size."""
        self._weighs = any(arm.weight < 1.0 for arm in arms)
        shape = self.settings.count, num_speculative_tokens
        self._forks: Float64Array = np.full(shape, _FORKS_AT_FIRST)
        """``[setting, k]``, how many forks a request has after each k < n accepted tokens."""
        for arm in arms:
            for what in ("verifications", "tokens", "seconds"):
                counters[f"draft_arm_{arm.name}_{what}"] = 0.0

    def begin(self, request: Request) -> None:
        """Choose an arm for a request, if it has a temperature."""
        if not request.temperature:
            return
        level = level_of(request.temperature)
        arm = self._best[level].choose()
        request.block = request.block.next(arm) if request.block else Block(arm)
        request.setting = self.settings.of(level, arm)

    def set_row(self, request: Request, guess_at: int) -> None:
        """Have a request's trunk, and all that forks off it, draft as its arm says.

        Args:
            request: whose.
            guess_at: the position of the token that is guessed to follow what is verified.
        """
        rows, trunk = self._rows, request.trunk
        rows.guess_at[trunk] = guess_at
        if rows.temperature[trunk] == request.temperature == 0.0:
            return
        rows.warm = True
        rows.temperature[trunk] = request.temperature
        rows.top_k[trunk] = request.top_k
        rows.top_p[trunk] = request.top_p
        rows.setting[trunk] = request.setting
        arm = self.settings.arms[request.block.arm] if request.block else Arm(False, 1.0)
        rows.samples[trunk] = arm.sampled and rows.num_sampled_from > 0
        rows.weight[trunk] = arm.weight
        rows.weighs |= arm.weight < 1.0
        forks = self._forks[request.setting]
        rows.weigh[trunk, : len(forks)] = np.maximum(1, np.rint(forks))

    def observe(
        self,
        requests: Sequence[Request],
        confirmed: Sequence[list[int]],
        seconds: float,
        price: float,
    ) -> None:
        """Take in verifications, before their outcomes are followed.

        Args:
            requests: those verified.
            confirmed: the new tokens of each.
            seconds: how long the verification took; 0.0 if that is not known.
            price: what verifying one more token costs the batch's other requests, in tokens.
        """
        usual = self._usual(len(requests), seconds) if seconds else 1.0
        for request, tokens in zip(requests, confirmed, strict=True):
            block = request.block
            if block is None:
                continue
            if self._weighs and request.trunk != DORMANT:
                self._count_forks(request)
            block.observe(len(tokens), request.verified, seconds, price, usual)
            if block.full:
                self._end(request, block)
                self.begin(request)

    def _usual(self, batch: int, seconds: float) -> float:
        """What a verification of so many requests usually takes; follows one that has ended."""
        level = level_of_batch(batch)
        usual = self._usual_seconds.get(level, seconds)
        self._usual_seconds[level] = usual + _SMOOTHING * (seconds - usual)
        return usual

    def finished(self, request: Request) -> None:
        """A request is over: its last block counts for as much as there is of it."""
        if request.block is not None:
            self._end(request, request.block)

    def _end(self, request: Request, block: Block) -> None:
        if not block.counted:
            return
        self._best[level_of(request.temperature)].observe(block)
        name = self.settings.arms[block.arm].name
        self._counters[f"draft_arm_{name}_verifications"] += block.counted
        self._counters[f"draft_arm_{name}_tokens"] += block.tokens
        self._counters[f"draft_arm_{name}_seconds"] += block.seconds

    def _count_forks(self, request: Request) -> None:
        """Follow how many forks there are after each k: so many tokens are weighed there."""
        n = request.verified
        ks = [k for k, _ in request.made if k < n]
        of = self._forks[request.setting, :n]
        of += _SMOOTHING * (np.bincount(ks, minlength=n)[:n] - of)
