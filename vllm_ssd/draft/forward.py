"""One forward of the draft model, over buffers that have been filled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_ssd.draft.buffers import Buffers
from vllm_ssd.draft.graphs import Padded
from vllm_ssd.draft.inputs import HostInputs


class Forward(NamedTuple):
    """A forward that is ready to run."""

    mode: Any
    """Which kind of CUDA graph it replays."""
    descriptor: Any
    """Which one."""
    padded: Padded
    buffers: Buffers
    metadata: dict[str, Any]
    """Of each attention layer, by its name."""
    rows: torch.Tensor
    last: torch.Tensor | slice
    """Where each sequence's last query token is."""


def attention_metadata(
    runner: Any, buffers: Buffers, host: HostInputs, padded: Padded, max_query: int
) -> dict[str, Any]:
    """The metadata of each attention layer, by its name.

    Args:
        runner: vLLM's model runner.
        buffers: what the forward reads.
        host: its inputs on the host.
        padded: its sizes.
        max_query: the most query tokens of a sequence.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    common = CommonAttentionMetadata(
        query_start_loc=buffers.starts,
        query_start_loc_cpu=torch.from_numpy(host.starts),
        seq_lens=buffers.lens,
        seq_lens_cpu_upper_bound=torch.from_numpy(host.lens),
        num_reqs=padded.sequences,
        num_actual_tokens=padded.attended,
        max_query_len=max_query,
        max_seq_len=int(host.lens.max()),
        block_table_tensor=buffers.tables,
        slot_mapping=buffers.slots,
        causal=True,
        positions=buffers.positions[: padded.attended],
    )
    per_layer: dict[str, Any] = {}
    for group in runner.attn_groups[0]:
        per_layer.update(dict.fromkeys(group.layer_names, group.build_metadata(common)))
    return per_layer


def last_hidden_states(forward: Forward, model: Any, config: Any) -> torch.Tensor:
    """Hidden states of each sequence's last query token, ``[n, width]``.

    Args:
        forward: what to compute.
        model: vLLM's model.
        config: of its engine.
    """
    from vllm.forward_context import set_forward_context

    buffers = forward.buffers
    with set_forward_context(
        forward.metadata,
        config,
        num_tokens=forward.padded.tokens,
        cudagraph_runtime_mode=forward.mode,
        batch_descriptor=forward.descriptor,
        slot_mapping=dict.fromkeys(forward.metadata, buffers.slots),
    ):
        hidden = model(input_ids=buffers.ids, positions=buffers.positions)
    last: torch.Tensor = hidden[forward.last]
    return last
