"""The counters and the ratios made of them."""

from __future__ import annotations

import pytest

from vllm_ssd.core.stats import Stats, add_draft_ratios


def test_ratios_are_absent_until_there_is_something_to_divide_by() -> None:
    values = Stats().as_dict()
    assert values["look_ups"] == 0
    assert not {"hit_rate", "mean_depth_at_hit", "mean_propose_seconds"} & values.keys()


def test_ratios_follow_from_the_counters() -> None:
    stats = Stats(look_ups=8, hits=6, depth_at_hit=24, proposals=4, propose_seconds=0.002)
    values = stats.as_dict()
    assert values["hit_rate"] == 0.75
    assert values["mean_depth_at_hit"] == 4.0
    assert values["mean_propose_seconds"] == pytest.approx(0.0005)


def test_draft_counters_get_their_means_and_stay_as_they_are() -> None:
    counters = {"draft_steps": 4.0, "draft_step_seconds": 0.2, "draft_rows": 48.0}
    values = add_draft_ratios(counters)
    assert values["mean_draft_step_seconds"] == pytest.approx(0.05)
    assert values["mean_draft_rows"] == 12.0
    assert "mean_draft_round_seconds" not in values
    assert "mean_draft_rows" not in counters


def test_the_rate_of_each_way_to_draft_follows_from_its_tokens() -> None:
    counters = {"draft_arm_greedy_tokens": 30.0, "draft_arm_greedy_seconds": 2.0}
    unused = {"draft_arm_c_0.3_tokens": 0.0, "draft_arm_c_0.3_seconds": 0.0}
    values = add_draft_ratios({**counters, **unused})
    assert values["mean_draft_arm_greedy_rate"] == 15.0
    assert "mean_draft_arm_c_0.3_rate" not in values
