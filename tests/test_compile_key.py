"""Our options are not part of the key of vLLM's compile cache; all else still is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import TinyModels
from vllm_ssd.plugin import PROPOSER, WORKER
from vllm_ssd.preflight import check_engine


def by_method(models: TinyModels, engine: dict[str, Any] | None = None, **options: Any) -> Any:
    """A configuration in the first-class spelling."""
    return EngineArgs(
        model=str(models.target),
        dtype="float32",
        max_model_len=256,
        speculative_config={
            "method": "ssd",
            "model": str(models.draft),
            "num_speculative_tokens": 3,
            **options,
        },
        **(engine or {}),
    ).create_engine_config()


def plainly(models: TinyModels, **options: Any) -> Any:
    """A configuration in vLLM's plain spelling."""
    own = {"model": str(models.draft), "num_speculative_tokens": 3, **options}
    return EngineArgs(
        model=str(models.target),
        dtype="float32",
        max_model_len=256,
        worker_cls=WORKER,
        additional_config={"ssd": own},
        speculative_config={
            "method": "custom_class",
            "model": PROPOSER,
            "num_speculative_tokens": 3,
        },
    ).create_engine_config()


def test_another_value_of_an_option_compiles_nothing_again(tiny_pair: TinyModels) -> None:
    one = by_method(tiny_pair, branches=8)
    other = by_method(tiny_pair, branches=16, model=str(tiny_pair.near), max_wait_ms=5.0)
    assert one.compute_hash() == other.compute_hash()
    # In the plain spelling as well, where the options come as a dictionary.
    assert plainly(tiny_pair, branches=4).compute_hash() == one.compute_hash()


def test_what_changes_the_targets_graph_still_counts(tiny_pair: TinyModels) -> None:
    one = by_method(tiny_pair)
    assert by_method(tiny_pair, {"max_num_batched_tokens": 512}).compute_hash() != (
        one.compute_hash()
    )
    # Entries of others may; with them the options count too, being in the same dictionary.
    theirs = by_method(tiny_pair, {"additional_config": {"somebody": 1}})
    others = by_method(tiny_pair, {"additional_config": {"somebody": 2}})
    assert len({config.compute_hash() for config in (one, theirs, others)}) == 3


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_vllm_adds_itself_stays_in_a_dictionary_it_reads(
    tiny_pair: TinyModels, backend: str
) -> None:
    config = by_method(tiny_pair, {"gdn_prefill_backend": backend})
    assert isinstance(config.additional_config, dict)
    assert config.additional_config["gdn_prefill_backend"] == backend


def test_options_reach_a_worker_of_another_process(tiny_pair: TinyModels) -> None:
    config = by_method(tiny_pair, branches=8)
    for arrived in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert check_engine(arrived) == check_engine(config)
        assert arrived.additional_config["ssd"]["branches"] == 8
        assert arrived.compute_hash() == config.compute_hash()
