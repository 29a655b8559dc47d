"""The options: defaults, what is refused, and the messages."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ssd.config import AUTO_BRANCHES, SSDConfig
from vllm_ssd.draft_resources import DraftResources


def parse(**options: Any) -> SSDConfig:
    return SSDConfig.parse({"model": "draft", "num_speculative_tokens": 4, **options})


def complaint(**options: Any) -> str:
    with pytest.raises(ValueError, match=r"^ssd: ") as caught:
        parse(**options)
    return str(caught.value)


def test_model_and_depth_are_enough() -> None:
    config = parse()
    assert config.fan_out_per_k is None
    assert config.max_branches == AUTO_BRANCHES
    assert config.max_wait_ms == "auto"
    assert not config.strict


def test_options_may_be_spelled_with_dashes() -> None:
    assert SSDConfig.parse({"model": "draft", "num-speculative-tokens": 4, "fan-out": 2}) == parse(
        fan_out=2
    )


def test_a_list_is_the_fan_out_of_each_k() -> None:
    config = parse(fan_out=[5, 4, 3, 2, 1])
    assert config.fan_out_per_k == (5, 4, 3, 2, 1)
    assert config.max_branches == 15


def test_the_geometric_fan_out_gives_likely_outcomes_more() -> None:
    fan_out = parse(fan_out={"geometric": 4, "acceptance": 0.8}).fan_out_per_k
    assert fan_out is not None
    assert sum(fan_out) == 20
    assert list(fan_out[:4]) == sorted(fan_out[:4], reverse=True)
    assert fan_out[4] > fan_out[3]


def test_branches_bounds_the_rows_of_a_request() -> None:
    assert parse(branches=6).max_branches == 6
    assert parse(branches=600).max_branches == 600
    assert parse(fan_out=3, branches=600).max_branches == 15


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fanout": 3}, ["unknown option 'fanout'", "did you mean 'fan_out'"]),
        ({"num_speculative_tokens": 0}, ["'num_speculative_tokens' = 0", "greater than"]),
        ({"num_speculative_tokens": 33}, ["'num_speculative_tokens' = 33", "less than"]),
        ({"num_speculative_tokens": "4"}, ["'num_speculative_tokens' = '4'", "integer"]),
        ({"num_speculative_tokens": True}, ["'num_speculative_tokens' = True", "integer"]),
        ({"model": ""}, ["'model' = ''"]),
        ({"fan_out": 0}, ["'fan_out' = 0", "'auto', an integer from 1 to 64"]),
        ({"fan_out": -1}, ["'fan_out' = -1", "from 1 to 64"]),
        ({"fan_out": 65}, ["'fan_out' = 65", "from 1 to 64"]),
        ({"fan_out": [0, 0, 0, 0, 0]}, ["'fan_out' = [0, 0, 0, 0, 0]", "not all 0"]),
        ({"fan_out": [1, 2]}, ["fan_out", "num_speculative_tokens + 1 = 5 numbers, got 2"]),
        ({"fan_out": "many"}, ["'fan_out' = 'many'", "integer", "{'geometric': an integer}"]),
        ({"fan_out": {}}, ["'fan_out' = {}", "'geometric' is missing (an integer from 1 to 64)"]),
        ({"fan_out": {"geometric": 0}}, ["{'geometric': 0}", "'geometric'", "or equal to 1"]),
        (
            {"fan_out": {"geometric": 3, "acceptance": 1.0, "r": 2}},
            ["'acceptance': input should be less than 1 and it has no 'r', only 'geometric'"],
        ),
        ({"branches": 0}, ["'branches' = 0", "from 1 to 1024"]),
        ({"branches": "all"}, ["'branches' = 'all'", "'auto'"]),
        ({"max_wait_ms": -1.0}, ["'max_wait_ms' = -1.0", "milliseconds from 0", "'auto'"]),
        ({"draft_device": "tpu"}, ["'draft_device' = 'tpu'"]),
        ({"draft_dtype": "int4"}, ["'draft_dtype' = 'int4'", "'bfloat16'"]),
        ({"draft_vocab": -1}, ["'draft_vocab' = -1", "0 for all, or a file of token ids"]),
        ({"draft_vocab": ""}, ["'draft_vocab' = ''", "a number of tokens"]),
        ({"draft_vocab": True}, ["'draft_vocab' = True", "a number of tokens"]),
        ({"draft_vocab": [1, 2]}, ["'draft_vocab' = [1, 2]", "a number of tokens"]),
        ({"draft_hf_overrides": "rope"}, ["'draft_hf_overrides' = 'rope'", "config.json"]),
        ({"draft_revision": ""}, ["'draft_revision' = ''", "at least 1 character"]),
        ({"draft_kv_cache_memory_bytes": 5}, ["'draft_kv_cache_memory_bytes' = 5"]),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_it_takes(
    options: dict[str, Any], said: list[str]
) -> None:
    message = complaint(**options)
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("fan_out_policy", "geometric", "fan_out = {'geometric': F}"),
        ("acceptance", 0.8, "leave it out"),
        ("miss_exponent", 1.0, "{'geometric': F, 'miss_exponent': r}"),
    ],
)
def test_a_removed_option_names_its_replacement(name: str, value: Any, mend: str) -> None:
    message = complaint(**{name: value})
    assert f"option {name!r} is gone" in message
    assert mend in message


def test_a_missing_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"^ssd: option 'model' is missing; add it"):
        SSDConfig.parse({"num_speculative_tokens": 4})


def test_every_wrong_option_is_reported_at_once() -> None:
    message = complaint(branches=0, draft_device="tpu")
    assert "'branches' = 0" in message
    assert "'draft_device' = 'tpu'" in message


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().fan_out = 5


def test_what_ray_is_asked_for() -> None:
    resources = parse(draft_placement="ray").draft_resources
    assert resources is None
    assert DraftResources().amounts(on_cpu=True) == {"CPU": 1.0}
    assert DraftResources().amounts(on_cpu=False) == {"GPU": 1.0}
    given = {"num_gpus": 0.5, "num_cpus": 2, "fast_disk": 1, "node": "10.0.0.7"}
    resources = parse(draft_placement="ray", draft_resources=given).draft_resources
    assert resources is not None
    assert resources.node == "10.0.0.7"
    for on_cpu in (True, False):
        assert resources.amounts(on_cpu) == {"GPU": 0.5, "CPU": 2.0, "fast_disk": 1.0}


def test_ray_options_survive_the_way_to_the_worker() -> None:
    config = parse(
        draft_placement="ray", draft_resources={"num_cpus": 2, "disk": 1}, draft_name="a"
    )
    assert SSDConfig.parse(config.model_dump(exclude_unset=True)) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draft_placement": "slurm"}, "'draft_placement' = 'slurm': needs 'process' or 'ray'"),
        ({"draft_name": "ours"}, "'draft_name' = 'ours': only a draft that Ray places has it"),
        ({"draft_resources": {"num_gpus": 1}}, "only a draft that Ray places has it"),
        (
            {"draft_placement": "ray", "draft_device": "cuda:1"},
            "'draft_device' = 'cuda:1': Ray chooses the device",
        ),
        ({"draft_placement": "ray", "draft_detached": True}, "set 'draft_name'"),
        ({"draft_placement": "ray", "draft_name": "no spaces"}, "needs letters, digits"),
        (
            {"draft_placement": "ray", "draft_resources": {"num_gpus": -1}},
            "'num_gpus' (at least 0)",
        ),
        ({"draft_placement": "ray", "draft_resources": {"disk": "big"}}, "custom resources"),
        ({"draft_placement": "ray", "draft_resources": {"disk": -1}}, "custom resources"),
    ],
)
def test_options_that_do_not_go_with_the_placement(options: dict[str, Any], said: str) -> None:
    assert said in complaint(**options)


@pytest.mark.parametrize("option", [{"draft_placement": "ray"}, {"draft_name": "ours"}])
def test_a_draft_at_an_address_is_not_placed(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="that is the draft server's own"):
        SSDConfig.parse({"num_speculative_tokens": 4, "draft_address": "unix:/run/ssd", **option})
