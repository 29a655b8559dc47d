"""Trials together cost no more than their share."""

from __future__ import annotations

import pytest

from vllm_ssd.core.credit import Credit


@pytest.mark.parametrize("foreseen", [0.0, 0.5, 2.0])
def test_trials_cost_their_share(foreseen: float) -> None:
    credit, spent = Credit(0.01), 0.0
    for now in range(100_000):
        if credit.ready(now, foreseen):
            spent += 1.0
            credit.spend(now, 1.0)
    assert spent <= 0.01 * 100_000 + 1.0
    assert spent > 0.004 * 100_000


def test_what_was_not_used_for_long_is_not_saved() -> None:
    credit = Credit(0.01)
    credit.spend(1e6, 1.0)  # paid with what there was
    credit.spend(1e6, 1.0)
    assert not credit.ready(1e6 + 99.0)
    assert credit.ready(1e6 + 100.0)
