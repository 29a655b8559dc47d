"""CUDA graphs of the draft: which sizes are captured, and what a batch is padded to."""

from __future__ import annotations

from typing import NamedTuple

_SMALLEST = (1, 2, 4)
_FINE_UP_TO = 256
_SMALL_CHUNKS = 512
"""Tokens up to which a step with prompt tokens also has a graph: vLLM's own default limit."""


def capture_sizes(max_rows: int, max_tokens: int) -> list[int]:
    """Batch sizes to capture: vLLM's own grid, and always the full batch of rows.

    Left alone, vLLM adds ``max_num_seqs`` to its grid only up to 512; given a largest size, it cuts
    that one down to its grid (``VllmConfig._set_cudagraph_sizes``). The draft decodes all of its
    rows most of the time, so that size must be one that is captured.

    Args:
        max_rows: most sequences of a batch.
        max_tokens: most tokens of a batch, at least ``max_rows``.

    Returns:
        Sizes in tokens, ascending.
    """
    largest = min(max(max_rows, min(2 * max_rows, _SMALL_CHUNKS)), max_tokens)
    grid = (*_SMALLEST, *range(8, _FINE_UP_TO, 8), *range(_FINE_UP_TO, largest + 1, 16))
    return sorted({max_rows, *(size for size in grid if size <= largest)})


class Padded(NamedTuple):
    """The sizes of one forward's inputs."""

    tokens: int
    """Length of token ids, positions and slots."""
    sequences: int
    """Sequences in the attention's metadata; those beyond the batch are empty."""
    attended: int
    """Tokens in the attention's metadata."""


def pad(
    tokens: int, sequences: int, full: bool, graph_tokens: int, graph_sequences: int | None
) -> Padded:
    """What a batch is padded to, as in ``GPUModelRunner.execute_model``.

    A full graph was captured with a fixed number of sequences. In a piecewise graph the attention
    runs outside and sees the batch as it is; without a graph nothing is padded.

    Args:
        tokens: query tokens of the batch.
        sequences: its sequences.
        full: whether it runs in a full graph.
        graph_tokens: tokens of the graph; ``tokens`` without one.
        graph_sequences: sequences of the graph; None where any number is fine.
    """
    if not full:
        return Padded(graph_tokens, sequences, tokens)
    return Padded(graph_tokens, graph_sequences or sequences, graph_tokens)
