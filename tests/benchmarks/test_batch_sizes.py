"""The programs' tables and sets of prompts, from figures that are known."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import prompts as sets
from benchmarks.batch_sizes import (
    ALL,
    OWN,
    PLACES,
    RIVALS,
    Point,
    curves,
    decoding_rate,
    details,
    draw,
    ideal,
    rivals_of,
    speeds,
)
from benchmarks.engines import (
    Engine,
    more_ssd_options,
    numbers,
    ssd_engine,
    ssd_name,
    ssd_options,
)
from benchmarks.hopeless_draft import PLAIN, RANDOM
from benchmarks.hopeless_draft import table as hopeless_table
from benchmarks.load import Measured
from benchmarks.rates import Rate, Slice
from benchmarks.settings import best, grid, table
from vllm_ssd.affinity import available_cores

SPECULATING = {"drafts": 100.0, "accepted_tokens": 150.0}
WATCHED = {
    "look_ups": 200.0,
    "first_look_ups": 8.0,
    "hits": 150.0,
    "tokens_accepted": 150.0,
    "verify_seconds": 5.0,
    "verify_intervals": 100.0,
    "propose_seconds": 4.0,
}


def text_of(shown: Table, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def found() -> dict[str, dict[int, Point]]:
    measured = {
        f"plain, {OWN}": [[Measured(Slice(20, 1.0), {})], [Measured(Slice(80, 1.0), {})]],
        f"plain, {ALL}": [[Measured(Slice(40, 1.0), {})], [Measured(Slice(160, 1.0), {})]],
        f"draft_model, K = 4, {OWN}": [
            [Measured(Slice(25, 1.0), SPECULATING)],
            [Measured(Slice(64, 1.0), SPECULATING)],
        ],
        "SSD, K = 4": [
            [Measured(Slice(40, 1.0), SPECULATING | WATCHED)],
            [Measured(Slice(100, 1.0), SPECULATING | WATCHED)],
        ],
    }
    return curves(measured, [1, 4])


def test_the_ideal_is_by_the_acceptance_length_of_draft_model() -> None:
    """Its acceptance length is 2.5, the verification takes 50 ms: ideally 50 tokens a second."""
    all_found = found()
    ours, rival = all_found["SSD, K = 4"], all_found[f"draft_model, K = 4, {OWN}"]
    assert ideal(ours[1], rival[1], 1) == pytest.approx(50)
    assert ideal(ours[4], rival[4], 4) == pytest.approx(200)
    assert ideal(ours[1], None, 1) is None


def test_decoding_alone_is_without_prefills() -> None:
    """192 verifications and 150 accepted tokens in 9 s of verifying and proposing."""
    assert decoding_rate(SPECULATING | WATCHED) == pytest.approx((192 + 150) / 9)


def test_speeds_have_their_ratio_to_plain_on_both_places() -> None:
    text = text_of(speeds(found(), "title"))
    assert "1.00 | 0.50" in text
    assert "2.00 | 1.00" in text  # SSD at batch 1
    assert "1.25 | 0.62" in text  # and at batch 4


def test_details_show_what_is_behind_ssds_speed() -> None:
    lines = [line.split() for line in text_of(details(found(), {"SSD, K = 4": 4})).splitlines()]
    cells = [[cell for cell in line if cell != "│"] for line in lines]
    same = ["0.750", "2.50", "2.50", "50.0", "ms"]
    assert ["SSD,", "K", "=", "4", "1", *same, "0.80", "0.76"] in cells
    assert ["SSD,", "K", "=", "4", "4", *same, "0.50", "0.19"] in cells


@pytest.mark.parametrize("left_out", [[], ["plain", "draft_model"]])
def test_tables_and_figure_need_no_rival(left_out: list[str], tmp_path: Path) -> None:
    some = {name: one for name, one in found().items() if name.split(",")[0] not in left_out}
    assert "SSD, K = 4" in text_of(speeds(some, "title"))
    assert "SSD, K = 4" in text_of(details(some, {"SSD, K = 4": 4}))
    draw(some, "title", tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "<svg" in drawn


def rivals(**options: Any) -> list[Engine]:
    asked = argparse.Namespace(rivals=RIVALS, places=list(PLACES), temperature=0.0)
    vars(asked).update(options)
    return rivals_of(Engine("SSD", {"method": "ssd"}, [0]), [4, 6], asked, "draft")


def test_rivals_run_on_the_cores_that_ssd_leaves_to_its_target() -> None:
    assert {one.name: one.cores for one in rivals()} == {
        f"plain, {OWN}": [0],
        f"draft_model, K = 4, {OWN}": [0],
        f"draft_model, K = 6, {OWN}": [0],
        f"plain, {ALL}": None,
        f"draft_model, K = 4, {ALL}": None,
        f"draft_model, K = 6, {ALL}": None,
    }
    assert not any(one.binds_itself for one in rivals())


def test_draft_model_samples_its_drafts_where_ssd_does() -> None:
    for temperature, method in ((0.0, "greedy"), (0.7, "probabilistic")):
        for one in rivals(rivals=["draft_model"], temperature=temperature):
            assert one.speculative_config is not None
            assert one.speculative_config["draft_sample_method"] == method


def test_one_setting_has_the_draft_process_that_its_users_have() -> None:
    last = max(available_cores())
    its = {"num_speculative_tokens": 4, "draft_cpu_cores": [last]}
    with ssd_engine("draft", {"SSD": its}, argparse.Namespace()) as engine:
        assert engine.speculative_config == {"method": "ssd", "model": "draft", **its}
        assert engine.cores == (sorted(set(available_cores()) - {last}) or [last])
        assert engine.binds_itself


def test_wrong_options_are_refused_before_anything_runs() -> None:
    assert ssd_options('{"num_speculative_tokens": 4}') == {"num_speculative_tokens": 4}
    assert more_ssd_options('{"branches": 3}') == {"branches": 3}
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean 'branches'"):
        ssd_options('{"num_speculative_tokens": 4, "branche": 3}')
    for wrong in ("K=4", "[4]", "4", '{"branches": 3}'):
        with pytest.raises(argparse.ArgumentTypeError):
            ssd_options(wrong)
    assert numbers("1,2,32") == [1, 2, 32]


def test_a_hopeless_draft_measured_once_has_no_other_rounds() -> None:
    drafted = {PLAIN: {}, RANDOM: {"proposals": 50.0, "rounds_off": 40.0}}
    once = {name: [[Measured(Slice(20, 1.0), its)]] for name, its in drafted.items()}
    lines = text_of(hopeless_table(once, [1], 6)).splitlines()
    assert any("1.00" in line and "-" in line and "80%" in line for line in lines)
    twice = {name: [[*of[0], *of[0]]] for name, of in once.items()}
    assert "1.00 ±" not in text_of(hopeless_table(twice, [1], 6))  # no error from one ratio


class TestSettings:
    """The grid, and what adapts against the best of it."""

    @staticmethod
    def rates(stories: float, code: float) -> dict[str, Rate]:
        return {"stories": Rate(stories, [stories]), "code": Rate(code, [code])}

    def test_grid_has_every_k_with_every_count(self) -> None:
        settings = grid([2, 4], [8], [3], {"backup": "none"})
        assert [ssd_name(one) for one in settings] == [
            "SSD, K = 2, branches 8, backup none",
            "SSD, K = 2, fan_out 3, backup none",
            "SSD, K = 4, branches 8, backup none",
            "SSD, K = 4, fan_out 3, backup none",
        ]

    def test_best_fixed_one_of_each_set_is_marked_and_what_adapts_compared_to_it(self) -> None:
        fixed = {"small": self.rates(80.0, 50.0), "large": self.rates(60.0, 100.0)}
        assert best(fixed) == {"stories": "small", "code": "large"}
        text = text_of(table(fixed, {"adaptive": self.rates(78.4, 102.0)}, "title"))
        assert "*80.0" in text
        assert "*100.0" in text
        assert text.count("*") == 3  # one of them in the caption
        assert "-2.0%" in text
        assert "+2.0%" in text


class TestPrompts:
    """Sets by name."""

    def test_stories_are_those_of_the_held_out_prompts_that_ask_for_one(self) -> None:
        hidden, stories = sets.prompts("hidden"), sets.prompts("stories")
        assert (len(hidden), len(stories)) == (213, 15)
        assert set(stories) < set(hidden)

    def test_order_is_always_the_same_and_not_that_of_the_file(self) -> None:
        hidden = sets.prompts("hidden")
        assert hidden == sets.prompts("hidden")
        assert hidden != [line["prompt"] for line in sets._lines(sets.HELD_OUT)]

    def test_mixture_takes_the_sets_in_turn_and_begins_short_ones_again(self) -> None:
        assert sets.mixed([["a", "b"], ["c"], ["d", "e"]]) == ["a", "c", "d", "b", "c", "e"]

    def test_mt_bench_and_humaneval_are_whole(self) -> None:
        assert len(sets.prompts("mt-bench")) == 80
        assert len(sets.prompts("humaneval")) == 164
        assert len(sets.prompts("mixture")) == 3 * 164

    def test_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="only mt-bench, humaneval"):
            sets.prompts("poems")
