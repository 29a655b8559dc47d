"""Decisions that do not depend on what was measured: the tiny models never gain by speculation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from vllm_ssd.core.switch import Switch
from vllm_ssd.target import rounds
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import LookUp


class AlwaysOn(Decisions):
    """Speculates in every round, with all that is found."""

    def decide(self, switch: Switch) -> bool:
        return True

    def choose(self, look_ups: Sequence[LookUp]) -> None:
        for each in look_ups:
            each.chosen = each.wanted


class AtAPrice(Decisions):
    """Speculates in every round, and verifies what is worth more than a price that is given."""

    def decide(self, switch: Switch) -> bool:
        return True


class InTurns(Decisions):
    """Some rounds with speculation, some without, for each request a part of what is found."""

    _TURNS = (9, 1, 4, 2, 12, 5, 3, 40)
    """Rounds with, rounds without, and so on."""
    _asked = 0

    def decide(self, switch: Switch) -> bool:
        at, on = self._asked % sum(self._TURNS), True
        self._asked += 1
        for count in self._TURNS:
            if at < count:
                return on
            at, on = at - count, not on
        raise AssertionError

    def choose(self, look_ups: Sequence[LookUp]) -> None:
        super().choose(look_ups)
        for number, each in enumerate(look_ups):
            each.chosen = (self._asked + number) % (len(each.below.drafted) + 1)


@contextmanager
def deciding(kind: type[Decisions]) -> Iterator[None]:
    """Engines started meanwhile decide like this."""
    with patch.object(rounds, "Decisions", kind):
        yield
