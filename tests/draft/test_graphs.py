"""Which CUDA graphs are captured and what a batch is padded to, by vLLM's own dispatcher."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny_models import TinyModels
from vllm_ssd.draft.graphs import Padded, capture_sizes, pad

MAX_TOKENS = 4096


def dispatcher(tiny: TinyModels, max_rows: int, **sizes: Any) -> Any:
    """vLLM's dispatcher, set up as with CUDA graphs, full ones for decodes.

    Args:
        tiny: the models.
        max_rows: ``max_num_seqs``.
        sizes: what the compilation config is given.
    """
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    config = EngineArgs(
        model=str(tiny.draft),
        dtype="float32",
        max_num_seqs=max_rows,
        max_num_batched_tokens=MAX_TOKENS,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 30,
    ).create_engine_config()
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.splitting_ops = None
    compilation.set_splitting_ops_for_v1(all2all_backend="")
    compilation.max_cudagraph_capture_size = sizes.get("largest")
    compilation.cudagraph_capture_sizes = sizes.get("sizes")
    config._set_cudagraph_sizes()
    made = CudagraphDispatcher(config)
    made.initialize_cudagraph_keys(compilation.cudagraph_mode, 1)
    return made


@pytest.mark.parametrize("max_rows", [1, 3, 21, 100, 257, 520, 1000, 1024])
def test_the_full_batch_of_rows_has_a_full_graph_of_its_size(
    tiny_pair: TinyModels, max_rows: int
) -> None:
    made = dispatcher(tiny_pair, max_rows, sizes=capture_sizes(max_rows, MAX_TOKENS))
    mode, descriptor = made.dispatch(num_tokens=max_rows, uniform_decode=True)
    assert mode.name == "FULL"
    assert (descriptor.num_tokens, descriptor.num_reqs) == (max_rows, max_rows)


def test_every_number_of_rows_has_a_full_graph(tiny_pair: TinyModels) -> None:
    made = dispatcher(tiny_pair, 21, sizes=capture_sizes(21, MAX_TOKENS))
    for rows in range(1, 22):
        mode, descriptor = made.dispatch(num_tokens=rows, uniform_decode=True)
        assert mode.name == "FULL"
        assert rows <= descriptor.num_reqs <= 21


def test_a_small_chunk_beside_the_rows_has_a_piecewise_graph(tiny_pair: TinyModels) -> None:
    made = dispatcher(tiny_pair, 21, sizes=capture_sizes(21, MAX_TOKENS))
    mode, descriptor = made.dispatch(num_tokens=21 + 10, uniform_decode=False)
    assert mode.name == "PIECEWISE"
    assert descriptor.num_tokens == 32


def test_a_largest_size_alone_would_leave_the_full_batch_without_a_graph(
    tiny_pair: TinyModels,
) -> None:
    """Why the sizes are listed; if this fails, vLLM has fixed it and the list can go."""
    made = dispatcher(tiny_pair, 21, largest=21)
    assert made.dispatch(num_tokens=21, uniform_decode=True)[0].name == "NONE"
    left_alone = dispatcher(tiny_pair, 520)
    assert left_alone.dispatch(num_tokens=520, uniform_decode=True)[0].name == "NONE"


@pytest.mark.parametrize("max_rows", [1, 2, 5, 255, 256, 1024])
def test_sizes_ascend_and_fit_the_token_budget(max_rows: int) -> None:
    sizes = capture_sizes(max_rows, max_rows + 3)
    assert sizes == sorted(set(sizes))
    assert max_rows in sizes
    assert sizes[0] == 1
    assert sizes[-1] <= max_rows + 3


def test_a_full_graph_is_padded_with_empty_sequences() -> None:
    assert pad(21, 21, full=True, graph_tokens=24, graph_sequences=22) == Padded(24, 22, 24)


def test_the_sequences_of_a_full_graph_are_not_its_tokens() -> None:
    """Where a mixed batch runs in a full graph: 200 tokens of 5 sequences, at most 24."""
    assert pad(200, 5, full=True, graph_tokens=256, graph_sequences=24) == Padded(256, 24, 256)


def test_around_a_piecewise_graph_the_attention_sees_the_batch_as_it_is() -> None:
    assert pad(50, 7, full=False, graph_tokens=56, graph_sequences=None) == Padded(56, 7, 50)


def test_without_a_graph_nothing_is_padded() -> None:
    assert pad(50, 7, full=False, graph_tokens=50, graph_sequences=None) == Padded(50, 7, 50)
