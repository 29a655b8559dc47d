"""KV blocks of the draft: vLLM's own block pool, and how branches share its blocks.

Rules (docs/design.md): a block is written only while one owner holds it; only blocks of verified
tokens enter the prefix cache; block 0 is vLLM's null block and never handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vllm_ssd.core.arrays import Int32Array

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

_KV_GROUP = 0
"""The draft's only KV cache group (full attention)."""


@dataclass
class VerifiedPrefix:
    """The hash chain of one request's full blocks of verified tokens; what vLLM's pool asks for."""

    block_hashes: list[BlockHash] = field(default_factory=list)


class KVBlocks:
    """Reference-counted KV blocks with a prefix cache.

    Args:
        num_blocks: blocks in all, the null block included.
        block_size: tokens per block.
        enable_prefix_caching: share blocks of verified tokens between requests.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.caching = enable_prefix_caching
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import hash_block_tokens, init_none_hash

        init_none_hash(sha256)
        self._hash: Callable[..., BlockHash] = partial(hash_block_tokens, sha256)
        self._num_blocks = num_blocks
        self._copies: dict[int, KVCacheBlock] = {}
        """Copies that the next forward must begin with: source by destination. Each holds a
        reference to its source: a block that is freed meanwhile is not reused before the copy."""
        self.reset()

    def reset(self) -> None:
        """All blocks are free, and the prefix cache is empty."""
        from vllm.v1.core.block_pool import BlockPool

        self._pool = BlockPool(self._num_blocks, self.caching, self.block_size)
        self._copies.clear()

    @property
    def count(self) -> int:
        """Blocks in all that can have an owner."""
        return self._num_blocks - 1  # vLLM keeps the null block

    @property
    def all_free(self) -> bool:
        """Whether no block has an owner."""
        return self.free_count == self.count

    @property
    def free_count(self) -> int:
        """Blocks that can be taken, cached ones without an owner included."""
        return self._pool.get_num_free_blocks()

    def take(self, count: int) -> list[KVCacheBlock]:
        """``count`` free blocks. The caller has checked :attr:`free_count`."""
        return self._pool.get_new_blocks(count)

    def give_back(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Drop the caller's hold on blocks; the tail of a text is reused before its beginning."""
        if self._copies:
            ids = [block.block_id for block in blocks if block.block_id in self._copies]
            self._pool.free_blocks([self._copies.pop(block_id) for block_id in ids])
        self._pool.free_blocks(reversed(blocks))

    def fork(
        self, trunks: list[list[KVCacheBlock]], starts: list[int], counts: list[int]
    ) -> list[list[KVCacheBlock]]:
        """Blocks for forks off trunks.

        A fork shares the trunk's blocks that are full where it starts and owns those after them.
        The one that is partly full there is copied: at most one a fork.

        Args:
            trunks: the blocks of the trunk that each fork leaves.
            starts: the position at which each fork starts.
            counts: how many blocks each is to own. The caller has checked :attr:`free_count`.
        """
        new = self.take(sum(counts))
        forks, sources, at = [], [], 0
        for trunk, start, count in zip(trunks, starts, counts, strict=True):
            own = new[at : at + count]
            at += count
            forks.append(own)
            if start % self.block_size:
                source = trunk[start // self.block_size]
                # A source whose own copy is not made yet: copy from where it comes from.
                source = self._copies.get(source.block_id, source)
                self._copies[own[0].block_id] = source
                sources.append(source)
        self._pool.touch(sources)
        return forks

    def take_copies(self) -> tuple[Int32Array, Int32Array]:
        """Sources and destinations of the copies to make before anything else is written."""
        copies, self._copies = self._copies, {}
        sources = list(copies.values())
        self._pool.free_blocks(sources)
        ids = np.array([block.block_id for block in sources], np.int32)
        return ids, np.array(list(copies), np.int32)

    def cached_prefix(
        self, tokens: Int32Array, prefix: VerifiedPrefix, first_block: int = 0
    ) -> list[KVCacheBlock]:
        """Take the cached blocks that hold the beginning of ``tokens``; fills ``prefix``.

        At least one token is left over: the forward over it yields the next logits.

        Args:
            tokens: a text.
            prefix: its hashes, as far as they are known.
            first_block: where to begin; the blocks before it are the caller's already.
        """
        if not self.caching:
            return []
        found: list[KVCacheBlock] = []
        hashes = self._hashes(tokens, prefix, (len(tokens) - 1) // self.block_size)
        for block_hash in hashes[first_block:]:
            cached = self._pool.get_cached_block(block_hash, [_KV_GROUP])
            if cached is None:
                break
            found += cached
        self._pool.touch(found)
        return found

    def share(
        self,
        tokens: Int32Array,
        first_block: int,
        prefix: VerifiedPrefix,
        blocks: list[KVCacheBlock],
    ) -> None:
        """Enter the full blocks of ``tokens`` (which start at ``first_block``) into the cache."""
        if not self.caching:
            return
        count = first_block + len(tokens) // self.block_size
        self._hashes(tokens, prefix, count, first_block)
        self._pool.cache_full_blocks(
            prefix,  # stands for a Request: only its block_hashes are read
            blocks,
            num_cached_blocks=first_block,
            num_full_blocks=count,
            block_size=self.block_size,
            kv_cache_group_id=_KV_GROUP,
        )

    def _hashes(
        self, tokens: Int32Array, prefix: VerifiedPrefix, count: int, first_block: int = 0
    ) -> list[BlockHash]:
        """The first ``count`` hashes of the chain, computing those that are missing."""
        chain = prefix.block_hashes
        while len(chain) < count:
            at = (len(chain) - first_block) * self.block_size
            block = tokens[at : at + self.block_size].tolist()
            chain.append(self._hash(chain[-1] if chain else None, block))
        return chain[:count]
