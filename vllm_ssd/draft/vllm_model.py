"""The draft model: a real vLLM worker, driven by direct forwards over hand-built block tables.

vLLM does the loading, quantisation, paged KV cache, attention backend, compilation and CUDA
graphs; CPU and CUDA share this code. The runner's own persistent buffers carry the inputs, because
CUDA graphs were captured over them.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from vllm_ssd import compat
from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.model import FROM_LAST_STEP, BlockChanges, Choices, Done, Sequences, Ticket


class VllmDraftModel:
    """A vLLM model with forkable sequences.

    Args:
        engine_args: arguments for vLLM's ``EngineArgs``; ``max_num_seqs`` bounds the sequences and
            ``max_num_batched_tokens`` the query tokens of one forward.
        local_rank: index of the CUDA device; 0 on CPU.

    Raises:
        ValueError: vLLM refuses the model or an argument.
    """

    def __init__(self, engine_args: dict[str, Any], local_rank: int = 0) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        self.config = EngineArgs(**engine_args).create_engine_config()
        self._worker = WorkerWrapperBase(rpc_rank=0)
        self._local_rank = local_rank
        self.lookahead = False
        """Whether launches do not wait for the device: on CUDA, once loaded."""

    def load(
        self,
        kv_cache_memory_bytes: int,
        num_candidates: int,
        vocab_size: int,
        draft_vocab: Int32Array | None = None,
    ) -> None:
        """Load the weights, allocate the KV cache, compile and capture.

        Args:
            kv_cache_memory_bytes: size of the KV cache; 0 for what vLLM finds to be free.
            num_candidates: C, how many best tokens a forward returns; no more than there are.
            vocab_size: only smaller ids are returned.
            draft_vocab: ``[N]``, the only ids that are returned, all of them below ``vocab_size``;
                the head is computed for no others. None for all.

        Raises:
            ValueError: the model's attention cannot be forked, or ``draft_vocab`` be selected.
        """
        self.config.cache_config.kv_cache_memory_bytes = kv_cache_memory_bytes or None
        # The process group of this one process meets in a file that has no name: a draft that is
        # killed at any moment leaves nothing behind.
        self._rendezvous = os.memfd_create("vllm-ssd-draft")
        self._worker.init_worker(
            [
                {
                    "vllm_config": self.config,
                    "local_rank": self._local_rank,
                    "rank": 0,
                    "distributed_init_method": f"file:///proc/self/fd/{self._rendezvous}",
                    "is_driver_worker": True,
                }
            ]
        )
        self._worker.init_device()
        self._worker.load_model()
        self._runner: Any = self._worker.worker.model_runner
        self._last_token = self.config.model_config.get_vocab_size() - 1
        self._num_logits = vocab_size
        self._token_ids: torch.Tensor | None = None
        if draft_vocab is not None:
            self._num_logits = len(draft_vocab)
            self._token_ids = torch.tensor(draft_vocab, device=self._runner.device)
            compat.select_head_rows(self._runner.get_model(), self.config, self._token_ids)
        self.num_blocks, self.block_size = compat.bring_up_kv_cache(self._worker, self.config)
        self._num_candidates = num_candidates
        self._table: Any = self._runner.input_batch.block_table[0]
        max_blocks = -(-self.config.model_config.max_model_len // self.block_size)
        self._tables = np.zeros((self.config.scheduler_config.max_num_seqs, max_blocks), np.int32)
        device = self._runner.device
        self.lookahead = device.type == "cuda"
        if self.lookahead:
            self._copy_stream = torch.cuda.Stream(device)
            self._inputs_copied = torch.cuda.Event()
            max_rows = self.config.scheduler_config.max_num_seqs
            # The first choice of each row's last step, by row: what it feeds next.
            self._next_token = torch.zeros(max_rows, dtype=torch.int32, device=device)
            self._row_index = torch.zeros(max_rows, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, changes: BlockChanges, sequences: Sequences) -> Ticket:
        """One forward; see :class:`vllm_ssd.draft.model.DraftModel`."""
        if len(changes.sources):
            sources, destinations = changes.sources.tolist(), changes.destinations.tolist()
            compat.copy_kv_blocks(self._runner.kv_caches, self.num_blocks, sources, destinations)
        self._tables[changes.rows, : changes.tables.shape[1]] = changes.tables
        rows = None
        if self.lookahead:
            rows = _fill(self._row_index, sequences.rows, len(sequences.rows))
        hidden, last = self._hidden_states(sequences, rows)
        logits = self._runner.model.compute_logits(hidden[last])[:, : self._num_logits]
        values, best = torch.topk(logits, self._num_candidates, dim=-1)
        tokens = best.to(torch.int32) if self._token_ids is None else self._token_ids[best]
        # Over the few that were chosen: as good a measure as over all, and nearly free.
        confidence = values.float().softmax(-1).nan_to_num()
        if rows is None:
            return Done(Choices(tokens.cpu().numpy(), confidence.cpu().numpy()))
        self._next_token[rows] = tokens[:, 0]
        return _Readback(tokens, confidence, self._copy_stream)

    def _hidden_states(
        self, sequences: Sequences, rows_on_device: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of all query tokens, and the index of each sequence's last one.

        Args:
            sequences: what to compute.
            rows_on_device: ``[n]``, their rows; None where no token is left to the last step.
        """
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        if self.lookahead:
            # As in vLLM's runner: metadata builders reuse pinned buffers of the step before.
            self._inputs_copied.synchronize()
        runner = self._runner
        count, total = len(sequences.query_lens), len(sequences.tokens)
        max_query = int(sequences.query_lens.max())
        mode, descriptor = runner.cudagraph_dispatcher.dispatch(
            num_tokens=total, uniform_decode=max_query == 1
        )
        padded = descriptor.num_tokens if mode != CUDAGraphMode.NONE else total
        # A full graph was captured with as many sequences as tokens; the extra ones are empty.
        full = mode == CUDAGraphMode.FULL
        rows, actual = (padded, padded) if full else (count, total)

        starts = np.zeros(rows + 1, np.int32)
        np.cumsum(sequences.query_lens, out=starts[1 : count + 1])
        starts[count + 1 :] = total
        lens = np.zeros(rows, np.int32)
        lens[:count] = sequences.positions[starts[1 : count + 1] - 1] + 1
        starts_cpu, lens_cpu = torch.from_numpy(starts), torch.from_numpy(lens)
        block_tables = self._tables[sequences.rows, : int(lens.max() - 1) // self.block_size + 1]
        used = block_tables.shape[1]

        # A padded vocabulary of the target may have ids that this embedding has not.
        tokens = np.minimum(sequences.tokens, self._last_token)
        ids = _fill(runner.input_ids.gpu, tokens, padded)
        if rows_on_device is not None and total == count:
            fed = ids[:count]
            fed.copy_(torch.where(fed == FROM_LAST_STEP, self._next_token[rows_on_device], fed))
        positions = _fill(runner.positions, sequences.positions, padded)
        query_start_loc = _fill(runner.query_start_loc.gpu, starts, rows + 1)
        seq_lens = _fill(runner.seq_lens, lens, rows)
        tables = self._table.block_table.gpu[:rows]
        _copy(tables[:count, :used], block_tables)
        slots = _fill(self._table.slot_mapping.gpu, self._slots(sequences), padded)
        slots[total:] = -1  # padding writes no KV

        metadata = CommonAttentionMetadata(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=starts_cpu,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=lens_cpu,
            num_reqs=rows,
            num_actual_tokens=actual,
            max_query_len=max_query,
            max_seq_len=int(lens.max()),
            block_table_tensor=tables,
            slot_mapping=slots,
            causal=True,
            positions=positions[:actual],
        )
        per_layer: dict[str, Any] = {}
        slot_mapping: dict[str, torch.Tensor] = {}
        for group in runner.attn_groups[0]:
            built = group.build_metadata(metadata)
            for name in group.layer_names:
                per_layer[name] = built
                slot_mapping[name] = slots
        if self.lookahead:
            self._inputs_copied.record()
        with set_forward_context(
            per_layer,
            self.config,
            num_tokens=padded,
            cudagraph_runtime_mode=mode,
            batch_descriptor=descriptor,
            slot_mapping=slot_mapping,
        ):
            hidden = runner.model(input_ids=ids, positions=positions)
        return hidden, query_start_loc[1 : count + 1].to(torch.int64) - 1

    def _slots(self, sequences: Sequences) -> np.ndarray[Any, np.dtype[np.int64]]:
        """KV slot of each query token, ``[T]``."""
        size = self.block_size
        rows = np.repeat(np.arange(len(sequences.query_lens)), sequences.query_lens)
        blocks = self._tables[sequences.rows[rows], sequences.positions // size].astype(np.int64)
        return blocks * size + sequences.positions % size

    def shutdown(self) -> None:
        """Release the worker."""
        self._worker.shutdown()


class _Readback:
    """A result on its way to the host, on a stream of its own so that the next forward runs.

    vLLM's ``AsyncGPUModelRunnerOutput`` does the same.

    Args:
        tokens: ``[n, C]``, the chosen ones on the device.
        confidence: ``[n]``, in the first of them.
        stream: the stream of the copy.
    """

    def __init__(
        self, tokens: torch.Tensor, confidence: torch.Tensor, stream: torch.cuda.Stream
    ) -> None:
        self._device = tokens, confidence  # not to be reused before the copy is done
        self._done = torch.cuda.Event(blocking=True)
        forward = torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(forward)
            self._tokens = tokens.to("cpu", non_blocking=True)  # pinned
            self._confidence = confidence.to("cpu", non_blocking=True)
            self._done.record()

    def result(self) -> Choices:
        """See :class:`vllm_ssd.draft.model.Ticket`."""
        self._done.synchronize()
        return Choices(self._tokens.numpy(), self._confidence.numpy())


def _fill(buffer: torch.Tensor, values: np.ndarray[Any, Any], size: int) -> torch.Tensor:
    """Copy values into the head of a persistent buffer; its first ``size`` elements."""
    _copy(buffer[: len(values)], values)
    return buffer[:size]


def _copy(target: torch.Tensor, values: np.ndarray[Any, Any]) -> None:
    """Copy values to the device; from pinned memory, or CUDA would wait for the step under way."""
    source = torch.from_numpy(values)
    if target.is_cuda:
        source = source.to(target.dtype).pin_memory()
    target.copy_(source, non_blocking=True)
