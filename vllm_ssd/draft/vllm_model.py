"""The draft model: a real vLLM worker, driven by direct forwards over hand-built block tables.

vLLM does the loading, quantisation, paged KV cache, attention backend, compilation and CUDA
graphs; CPU and CUDA share this code. The runner's own persistent buffers carry the inputs, because
CUDA graphs were captured over them. The block table of every row stays on the device: a step sends
those that have changed, and gathers the batch's. On CPU numpy does that in the same buffers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_ssd import compat
from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.buffers import Buffers, HostBuffers, fill_on_host, runner_buffers
from vllm_ssd.draft.choosing import Chooser
from vllm_ssd.draft.forward import Forward, attention_metadata, last_hidden_states
from vllm_ssd.draft.graphs import Padded, capture_sizes, pad
from vllm_ssd.draft.head import select_head_rows
from vllm_ssd.draft.inputs import (
    DeviceInputs,
    after_last_step,
    fill_slots,
    host_inputs,
    send,
    sequence_of_tokens,
)
from vllm_ssd.draft.kv_cache import (
    bring_up_kv_cache,
    compile_on_cpu,
    copy_kv_blocks,
    plan_layout,
)
from vllm_ssd.draft.model import BlockChanges, Done, Sequences, Ticket
from vllm_ssd.draft.readback import Readback


class VllmDraftModel:
    """A vLLM model with forkable sequences.

    Args:
        engine_args: arguments for vLLM's ``EngineArgs``; ``max_num_seqs`` bounds the sequences and
            ``max_num_batched_tokens`` the query tokens of one forward.

    Raises:
        RuntimeError: this vLLM lacks a name that is used.
        ValueError: vLLM refuses the model or an argument.
    """

    def __init__(self, engine_args: dict[str, Any]) -> None:
        compat.check_draft()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        # Where there are no CUDA graphs, vLLM drops the sizes.
        sizes = capture_sizes(engine_args["max_num_seqs"], engine_args["max_num_batched_tokens"])
        arguments = {**engine_args, "cudagraph_capture_sizes": sizes}
        self.config = EngineArgs(**arguments).create_engine_config()
        self._worker = WorkerWrapperBase(rpc_rank=0)
        self.lookahead = False
        """Whether launches do not wait for the device: on CUDA, once loaded."""
        self.graph_steps = 0
        """See :class:`vllm_ssd.draft.model.DraftModel`."""

    def load(self, vocab_size: int, draft_vocab: Int32Array | None = None) -> None:
        """Load the weights.

        Args:
            vocab_size: only smaller ids are returned.
            draft_vocab: ``[N]``, the ids that the head is computed for, all of them below
                ``vocab_size``; no others are returned. None for all.

        Raises:
            ValueError: the head's rows that ``draft_vocab`` names cannot be selected.
        """
        # The process group of this one process meets in a file that has no name: a draft that is
        # killed at any moment leaves nothing behind.
        self._rendezvous = os.memfd_create("vllm-ssd-draft")
        self._worker.init_worker(
            [
                {
                    "vllm_config": self.config,
                    "local_rank": 0,  # of the one device that this process sees
                    "rank": 0,
                    "distributed_init_method": f"file:///proc/self/fd/{self._rendezvous}",
                    "is_driver_worker": True,
                }
            ]
        )
        self._worker.init_device()
        self._worker.load_model()
        runner: Any = self._worker.worker.model_runner
        self._runner, self._device = runner, runner.device
        self._last_token = self.config.model_config.get_vocab_size() - 1
        self._num_logits = vocab_size
        self._token_ids: torch.Tensor | None = None
        if draft_vocab is not None:
            self._num_logits = len(draft_vocab)
            self._token_ids = torch.tensor(draft_vocab, device=self._device)
            select_head_rows(runner.get_model(), self.config, self._token_ids)
        plan_layout(self._worker, self.config)

    def compile(self) -> None:
        """Compile the model, where that needs no KV cache: on CPU."""
        if self._device.type == "cpu":
            compile_on_cpu(self._worker, self.config)

    def allocate(
        self, kv_cache_memory_bytes: int, num_candidates: int, num_sampled_from: int = 0
    ) -> None:
        """Allocate the KV cache; compile, if that has not been done, and capture.

        Args:
            kv_cache_memory_bytes: size of the KV cache; 0 for what vLLM finds to be free.
            num_candidates: C, how many best tokens a forward returns; no more than there are.
            num_sampled_from: N, sampled tokens come from so many of the best; no more than there
                are. 0: none are sampled.

        Raises:
            RuntimeError: the runner of this vLLM lacks an attribute that is used.
            ValueError: the model's attention cannot be forked.
        """
        self.config.cache_config.kv_cache_memory_bytes = kv_cache_memory_bytes or None
        self.num_blocks, self.block_size = bring_up_kv_cache(self._worker, self.config)
        runner = self._runner
        compat.check_draft_runner(runner)
        self._chooser = Chooser(num_candidates, num_sampled_from, self._token_ids, self._device)
        self._buffers = runner_buffers(runner)
        self._row_tables = torch.zeros_like(self._buffers.tables)
        """``[max_rows, blocks]``, the block table of each row, whatever the batch."""
        self._index = torch.arange(len(self._row_tables), device=self._device)
        self._host: HostBuffers | None = None
        if self._device.type == "cpu":
            in_place = [buffer.numpy() for buffer in (*self._buffers, self._row_tables)]
            self._host = HostBuffers(*in_place)
        self.lookahead = self._device.type == "cuda"
        if self.lookahead:
            self._copy_stream = torch.cuda.Stream(self._device)
            self._inputs_copied = torch.cuda.Event()
            self._next_tokens = torch.zeros(
                len(self._row_tables), dtype=torch.int32, device=self._device
            )
            """``[max_rows]``, the next token of each row's last forward: what it feeds next."""

    @torch.inference_mode()
    def launch(self, changes: BlockChanges, sequences: Sequences) -> Ticket:
        """One forward; see :class:`vllm_ssd.draft.model.DraftModel`.

        An error leaves the model usable. The tables in ``changes`` may be lost with it: they must
        be sent again.
        """
        with self._input_buffers():
            if len(changes.sources):
                copy_kv_blocks(self._runner.kv_caches, self.num_blocks, *changes[:2])
            forward = self._prepare(changes, sequences)
        hidden = last_hidden_states(forward, self._runner.model, self.config)
        logits = self._runner.model.compute_logits(hidden)[:, : self._num_logits]
        if not self.lookahead:
            return Done(self._chooser.on_host(logits, sequences.sampling))
        chosen = self._chooser.on_device(logits, sequences.sampling)
        self._next_tokens[forward.rows] = chosen.next_tokens
        return Readback(chosen, self._copy_stream)

    @contextmanager
    def _input_buffers(self) -> Iterator[None]:
        """Inside, buffers that were copied to the device may be filled again.

        vLLM's builders of attention metadata fill pinned ones. Its runner does the same
        (``synchronize_input_prep``).
        """
        if not self.lookahead:
            yield
            return
        self._inputs_copied.synchronize()
        try:
            yield
        finally:
            self._inputs_copied.record()

    def _prepare(self, changes: BlockChanges, sequences: Sequences) -> Forward:
        """Bring a step's inputs to the device and build the attention's metadata."""
        if self._host is not None:
            return self._prepare_on_host(self._host, changes, sequences)
        from vllm.config import CUDAGraphMode

        count, total = len(sequences.query_lens), len(sequences.tokens)
        max_query = int(sequences.query_lens.max())
        mode, descriptor = self._runner.cudagraph_dispatcher.dispatch(
            num_tokens=total, uniform_decode=max_query == 1
        )
        full = mode == CUDAGraphMode.FULL
        self.graph_steps += full
        padded = pad(total, count, full, descriptor.num_tokens, descriptor.num_reqs)
        host = host_inputs(sequences, padded)
        inputs = send(changes, sequences, host, self._device)
        tables = self._row_tables
        if len(changes.forks):
            tables[inputs.forks, : changes.shared] = tables[inputs.trunks, : changes.shared]
        if len(changes.rows):
            tables[inputs.changed_rows, inputs.changed_columns] = inputs.changed_blocks
        used = int(host.lens.max() - 1) // self.block_size + 1
        buffers = self._fill(inputs, padded, used)
        return Forward(
            mode,
            descriptor,
            padded,
            buffers,
            attention_metadata(self._runner, buffers, host, padded, max_query),
            inputs.rows,
            buffers.starts[1 : count + 1] - 1 if total > count else slice(count),
        )

    def _prepare_on_host(
        self, host: HostBuffers, changes: BlockChanges, sequences: Sequences
    ) -> Forward:
        """As :meth:`_prepare` on CPU, where there are no graphs and nothing is padded."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import BatchDescriptor

        count, total = len(sequences.rows), len(sequences.tokens)
        filled = fill_on_host(host, changes, sequences, self.block_size, self._last_token)
        padded = Padded(total, count, total)
        buffers = self._buffers.cut(padded)
        max_query = int(sequences.query_lens.max())
        return Forward(
            CUDAGraphMode.NONE,
            BatchDescriptor(total),
            padded,
            buffers,
            attention_metadata(self._runner, buffers, filled, padded, max_query),
            torch.from_numpy(sequences.rows),
            buffers.starts[1:] - 1 if total > count else slice(count),
        )

    def _fill(self, inputs: DeviceInputs, padded: Padded, used: int) -> Buffers:
        """Fill the persistent buffers; what follows from the inputs is computed on the device.

        Args:
            inputs: of the step.
            padded: their sizes in the buffers.
            used: entries of the longest block table.
        """
        from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID

        buffers = self._buffers.cut(padded)
        count, total = len(inputs.rows), len(inputs.tokens)
        tokens = inputs.tokens
        if self.lookahead and total == count:
            tokens = after_last_step(tokens, inputs.rows, self._next_tokens)
        # A padded vocabulary of the target may have ids that this embedding lacks.
        torch.clamp(tokens, max=self._last_token, out=buffers.ids[:total])
        positions = buffers.positions[:total]
        positions.copy_(inputs.positions)
        buffers.starts.copy_(inputs.starts)
        buffers.lens.copy_(inputs.lens)
        tables = buffers.tables
        tables[:count, :used] = self._row_tables[inputs.rows, :used]
        if padded.sequences > count:
            tables[count:] = NULL_BLOCK_ID
        sequence = sequence_of_tokens(buffers.starts[: count + 1], self._index[:count], total)
        fill_slots(buffers.slots[:total], tables, sequence, positions, self.block_size)
        if padded.tokens > total:
            buffers.slots[total:] = PAD_SLOT_ID  # padding writes no KV
        return buffers

    def shutdown(self) -> None:
        """Release the worker."""
        self._worker.shutdown()
