"""The draft's algorithm: follow what verification confirms, guess how the next one ends, decode.

Per request there is a trunk, which follows the confirmed text and the tokens being verified, and
forks off the trunk, one for each guessed outcome. When an outcome arrives the branch that came
true becomes the trunk, all other forks are freed and new ones are made; on a miss the trunk is cut
back to the confirmed text and extended. All rows of all requests are decoded in one batch, one
token a step, and every step is published.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from vllm_ssd.core.budget import StepTimeModel, affordable_guesses
from vllm_ssd.core.fanout import likeliest_guesses
from vllm_ssd.core.tree import Int32Array, Where
from vllm_ssd.draft.blocks import KVBlocks, VerifiedPrefix
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.rows import MAX_STOP_TOKENS, Rows
from vllm_ssd.wire.messages import (
    Finished,
    Forked,
    Outcomes,
    Planted,
    Start,
    Stepped,
    ToTarget,
    Trimmed,
    pack,
    unpack,
)

_NO_TOKENS = np.zeros(0, np.int32)


class OutOfStepError(Exception):
    """What the target says does not fit what it said before: a new epoch is needed."""


class Sequences(NamedTuple):
    """What one forward computes: ``n`` sequences with ``T`` query tokens in all."""

    block_tables: Int32Array
    """``[n, blocks]``."""
    query_lens: Int32Array
    """``[n]``; sequences with one query token come first."""
    tokens: Int32Array
    """``[T]``."""
    positions: Int32Array
    """``[T]``."""


class DraftModel(Protocol):
    """What the engine needs of a model."""

    def forward(self, sequences: Sequences) -> Int32Array:
        """Write the KV of all query tokens and return ``[n, C]``: the best C next tokens of each
        sequence's last query token, best first, all below the target's vocabulary size."""

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy KV blocks, ordered before the next forward."""


class Policy(NamedTuple):
    """What the engine guesses."""

    num_speculative_tokens: int
    fan_out: tuple[int, ...]
    max_branches: int
    """Forks and trunk per request; 0: as many as the step time affords."""
    acceptance: float
    miss_exponent: float
    max_wait_s: float = 0.0


class _NewForks(NamedTuple):
    """Forks of one request that are not published yet; parallel lists."""

    request: Request
    k: list[int]
    tokens: list[int]
    rows: list[int]


class DraftEngine:
    """Requests, trees and rounds over one draft model.

    Args:
        model: the draft model.
        rows: the rows of its batch.
        blocks: the blocks of its KV cache.
        policy: which outcomes are guessed.
        prefill_chunk: most prompt tokens per step while other requests decode.
        prefill_chunk_idle: the same while none does.
    """

    def __init__(
        self,
        model: DraftModel,
        rows: Rows,
        blocks: KVBlocks,
        policy: Policy,
        prefill_chunk: int,
        prefill_chunk_idle: int,
    ) -> None:
        self.model = model
        self.rows = rows
        self.blocks = blocks
        self.policy = policy
        self.requests: dict[int, Request] = {}
        self.counters: dict[str, float] = dict.fromkeys(
            (
                "draft_steps",
                "draft_step_seconds",
                "draft_python_seconds",
                "draft_rows",
                "draft_rounds",
                "draft_round_seconds",
                "draft_forks",
                "draft_prefill_tokens",
                "draft_narrowed",
                "draft_evictions",
            ),
            0.0,
        )
        self._prefill_chunk = prefill_chunk
        self._prefill_chunk_idle = prefill_chunk_idle
        self._catching_up: dict[int, Request] = {}
        self._clock = StepTimeModel()
        self._verify_seconds = 0.0
        self._frame = 0
        self._round_began: float | None = None
        self._batch = 1
        self._planted: dict[int, Request] = {}
        self._withdrawn: set[int] = set()
        self._forked: dict[int, _NewForks] = {}

    # ---- what the target says

    def reset(self) -> None:
        """Forget all requests; the KV of verified prefixes stays in the cache."""
        for request in list(self.requests.values()):
            self._finish(request)
        self._planted.clear()
        self._withdrawn.clear()
        self._forked.clear()
        self.rows.cache.clear()

    def start(self, message: Start) -> None:
        """A new request, or a known one whose text is announced again."""
        known = self.requests.get(message.handle)
        if known is not None:
            self._finish(known)
        tokens = unpack(message.tokens)
        text = np.zeros(min(message.limit, len(tokens) + 4096) + 1, np.int32)
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        ends = message.stop[:MAX_STOP_TOKENS]
        stop[: len(ends)] = ends
        request = Request(message.handle, text, 0, message.limit, stop, VerifiedPrefix())
        request.append(tokens.tolist())
        request.last_used = self._frame
        self.requests[message.handle] = request
        self._wake(request)

    def finished(self, message: Finished) -> None:
        """Free what finished requests hold."""
        for handle in unpack(message.handles).tolist():
            request = self.requests.get(handle)
            if request is not None:
                self._finish(request)

    def trimmed(self, message: Trimmed) -> None:
        """Drop the forks of outcomes that cannot happen, since fewer tokens are verified."""
        counts = unpack(message.verified_counts).tolist()
        for handle, verified in zip(unpack(message.handles).tolist(), counts, strict=True):
            request = self.requests.get(handle)
            if request is None or verified >= request.verified:
                continue
            request.verified = verified
            request.forks_wanted = request.forks_wanted[: verified + 1]
            last = request.length + verified
            beyond = [row for row in request.forks if self.rows.start[row] > last]
            # The target still knows these rows; they just do not grow any more.
            self.rows.pending[beyond] = False
            self._announce_forks(request, [], [], [])

    def outcomes(self, message: Outcomes) -> None:
        """Follow what was confirmed and guess what comes next.

        Raises:
            OutOfStepError: the text does not continue what is known of the request.
        """
        self._frame += 1
        self._batch = len(message.handles) // 4
        if message.verify_us:
            seconds = message.verify_us * 1e-6
            before = self._verify_seconds or seconds
            self._verify_seconds = before + 0.2 * (seconds - before)
        handles = unpack(message.handles).tolist()
        lengths = unpack(message.lengths).tolist()
        confirmed = unpack(message.confirmed_counts).tolist()
        proposed = unpack(message.proposed_counts).tolist()
        tokens = unpack(message.tokens).tolist()
        at = 0
        for handle, length, n_new, n_proposed in zip(
            handles, lengths, confirmed, proposed, strict=True
        ):
            request = self.requests.get(handle)
            if request is None or request.length != length:
                raise OutOfStepError(f"request {handle} at length {length}")
            middle, end = at + n_new, at + n_new + n_proposed
            self._follow(request, tokens[at:middle], tokens[middle:end])
            at = end
        if at != len(tokens):
            raise OutOfStepError(f"{len(tokens) - at} tokens left over")
        self._begin_round()

    # ---- one step

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._catching_up) or bool(self.rows.pending.any())

    def publications(self) -> list[ToTarget]:
        """What changed since the last call, in the order the target must apply it."""
        messages: list[ToTarget] = []
        if self._planted or self._withdrawn:
            messages.append(self._planted_message())
        if self._forked:
            messages.append(self._forked_message())
        return messages

    def step(self) -> list[ToTarget]:
        """Decode every pending row by one token, prefill some, make the forks that became known.

        Returns:
            What to publish.
        """
        messages = self.publications()
        began = time.perf_counter()
        decoding = np.flatnonzero(self.rows.pending).astype(np.int32)
        chunks = self._next_chunks(len(decoding))
        sequences = self._sequences(decoding, chunks)
        forward_began = time.perf_counter()
        top = self.model.forward(sequences)
        forward_seconds = time.perf_counter() - forward_began
        grown, tokens = self._take_results(decoding, chunks, top)
        if len(grown):
            ended = grown[self.rows.cache.ended[grown]]
            messages.append(Stepped(pack(grown), pack(tokens), pack(ended)))
        self._make_forks()
        messages += self.publications()
        if not chunks:
            self._clock.observe(len(decoding), time.perf_counter() - began)
        if self._round_began is not None and not self.has_work:
            self.counters["draft_rounds"] += 1
            self.counters["draft_round_seconds"] += time.perf_counter() - self._round_began
            self._round_began = None
        seconds = time.perf_counter() - began
        self.counters["draft_steps"] += 1
        self.counters["draft_rows"] += len(decoding)
        self.counters["draft_step_seconds"] += seconds
        self.counters["draft_python_seconds"] += seconds - forward_seconds
        return messages

    def _next_chunks(self, decoding: int) -> list[tuple[Request, int]]:
        """Which requests catch up with their text in this step, and by how many tokens."""
        budget = self._prefill_chunk if decoding else self._prefill_chunk_idle
        chunks: list[tuple[Request, int]] = []
        for request in self._catching_up.values():
            missing = request.length - int(self.rows.computed[request.trunk])
            count = min(missing, budget)
            chunks.append((request, count))
            budget -= count
            if budget == 0:
                break
        # A chunk of one token is a decode to the model, and decodes come first.
        chunks.sort(key=lambda chunk: chunk[1] > 1)
        return chunks

    def _sequences(self, decoding: Int32Array, chunks: list[tuple[Request, int]]) -> Sequences:
        rows = self.rows
        if not chunks:
            used = int(rows.computed[decoding].max()) // self.blocks.block_size + 1
            return Sequences(
                rows.block_table[decoding, :used],
                np.ones(len(decoding), np.int32),
                rows.feed_token[decoding],
                rows.computed[decoding],
            )
        trunks = np.array([request.trunk for request, _ in chunks], np.int32)
        starts = rows.computed[trunks]
        tokens, positions = [rows.feed_token[decoding]], [rows.computed[decoding]]
        for (request, count), start in zip(chunks, starts.tolist(), strict=True):
            tokens.append(request.text[start : start + count])
            positions.append(np.arange(start, start + count, dtype=np.int32))
        counts = np.array([count for _, count in chunks], np.int32)
        all_rows = np.concatenate([decoding, trunks])
        all_positions = np.concatenate(positions)
        used = int(all_positions.max()) // self.blocks.block_size + 1
        self.counters["draft_prefill_tokens"] += int(counts.sum())
        return Sequences(
            rows.block_table[all_rows, :used],
            np.concatenate([np.ones(len(decoding), np.int32), counts]),
            np.concatenate(tokens),
            all_positions,
        )

    def _take_results(
        self, decoding: Int32Array, chunks: list[tuple[Request, int]], top: Int32Array
    ) -> tuple[Int32Array, Int32Array]:
        """Grow the rows that decoded, and the trunks that have caught up."""
        if not chunks:
            return self.rows.take_step(decoding, top)
        done_rows, done_at = [], []
        for i, (request, count) in enumerate(chunks, start=len(decoding)):
            # take_step counts the last token itself.
            self.rows.computed[request.trunk] += count - 1
            if int(self.rows.computed[request.trunk]) == request.length - 1:
                del self._catching_up[request.handle]
                done_rows.append(request.trunk)
                done_at.append(i)
            else:
                self.rows.computed[request.trunk] += 1
            self._share_verified(request)
        rows = np.concatenate([decoding, np.array(done_rows, np.int32)])
        kept = np.concatenate([np.arange(len(decoding)), np.array(done_at, np.int64)])
        return self.rows.take_step(rows, top[kept])

    # ---- following the text

    def _follow(self, request: Request, confirmed: list[int], proposed: list[int]) -> None:
        """The branch that came true becomes the trunk; without one the trunk is cut back."""
        request.last_used = self._frame
        if request.trunk == DORMANT:
            request.append(confirmed)
            self._wake(request)
            return
        walk = self.rows.cache.walk(request.handle, confirmed)
        old_length = request.length
        request.append(confirmed)
        if walk.where is Where.FOUND:
            if walk.row != request.trunk:
                self._adopt(request, walk.row)
            self._drop_forks(request)
            self.rows.rebase(request.trunk, request.length)
        else:
            self._drop_forks(request)
            kept = old_length + (walk.offset if walk.where is not Where.UNKNOWN else 0)
            self._cut_back(request, min(kept, int(self.rows.computed[request.trunk])))
        if request.length >= request.limit - 1:
            # Nothing can be drafted before the end any more.
            self._sleep(request)
            return
        self._share_verified(request)
        self._plan(request, proposed)

    def _adopt(self, request: Request, row: int) -> None:
        """Make a fork the trunk: its own blocks replace the trunk's from its start on."""
        own = request.forks.pop(row)
        first_own = int(self.rows.start[row]) // self.blocks.block_size
        self.blocks.give_back(request.blocks[first_own:])
        request.blocks[first_own:] = own
        self.rows.give_back([request.trunk])
        request.trunk = row

    def _cut_back(self, request: Request, computed: int) -> None:
        """Keep ``computed`` positions of the trunk and feed the confirmed tokens after them."""
        self.rows.restart(request.trunk, request.length, computed)
        if request.length - computed == 1:
            self.rows.feed_token[request.trunk] = request.text[computed]
            self.rows.pending[request.trunk] = True
            self._catching_up.pop(request.handle, None)
        else:
            self._catching_up[request.handle] = request

    def _plan(self, request: Request, proposed: list[int]) -> None:
        """Plant the next tree: how far the trunk grows, how many forks are wanted where."""
        rows, trunk, policy = self.rows, request.trunk, self.policy
        depth = policy.num_speculative_tokens
        length = int(rows.cache.length[trunk])
        known = rows.cache.tokens[trunk, : min(length, len(proposed))].tolist()
        request.verified = len(proposed) if known == proposed else 0
        grow_to = min(len(proposed) + 1 + depth, request.limit - request.length)
        rows.room[trunk] = max(0, grow_to - length)
        if not self._cover(request, request.length + max(grow_to, length)):
            self._sleep(request)
            return
        at_rest = not rows.pending[trunk] and request.handle not in self._catching_up
        if at_rest and not rows.cache.ended[trunk] and rows.room[trunk] > 0:
            rows.resume(trunk)
        guesses = likeliest_guesses(
            request.verified, policy.fan_out, policy.acceptance, policy.miss_exponent
        )
        count = policy.max_branches or affordable_guesses(
            guesses,
            self._clock,
            self._verify_seconds + policy.max_wait_s,
            self._batch,
            depth,
            policy.acceptance,
        )
        wanted = [0] * (request.verified + 1)
        for guess in guesses[:count]:
            wanted[guess.accepted] += 1
        # The trunk itself goes on with the first choice after all n.
        wanted[-1] = max(0, wanted[-1] - 1)
        if rows.cache.ended[trunk]:
            # Nothing follows an end token that is accepted.
            wanted = wanted[: int(rows.cache.length[trunk])]
        request.forks_wanted = wanted
        request.next_k = 0
        self._plant(request)
        self._fork(request)

    def _plant(self, request: Request) -> None:
        """A new tree over the trunk as it is; nothing of the old one is published any more."""
        cache, trunk = self.rows.cache, request.trunk
        tokens = cache.tokens[trunk, : cache.length[trunk]].copy()
        cache.plant(request.handle, request.length, trunk, tokens, bool(cache.ended[trunk]))
        self._withdrawn.discard(request.handle)
        self._forked.pop(request.handle, None)
        self._planted[request.handle] = request

    # ---- forks

    def _make_forks(self) -> None:
        """Fork wherever the last step made candidates known."""
        for request in self.requests.values():
            if request.trunk != DORMANT and request.next_k < len(request.forks_wanted):
                self._fork(request)

    def _fork(self, request: Request) -> None:
        """Fork off the trunk after every k whose candidates are known by now."""
        rows, trunk = self.rows, request.trunk
        known = int(rows.computed[trunk]) - request.length
        if known < request.next_k:
            return
        k_list: list[int] = []
        tokens: list[int] = []
        drafted = rows.cache.row_tokens(trunk)
        ends = set(request.stop.tolist())
        last = min(known, len(request.forks_wanted) - 1)
        for k in range(request.next_k, last + 1):
            if request.length + k + 1 >= request.limit:
                break
            candidates = rows.candidates[trunk, k].tolist()
            taken = drafted[k] if k < len(drafted) else candidates[0]
            choices = [t for t in candidates if t != taken and t not in ends]
            choices = choices[: request.forks_wanted[k]]
            k_list += [k] * len(choices)
            tokens += choices
        request.next_k = last + 1
        made = self._add_forks(request, np.array(k_list, np.int32), np.array(tokens, np.int32))
        self._announce_forks(request, k_list[: len(made)], tokens[: len(made)], made)

    def _add_forks(self, request: Request, k: Int32Array, tokens: Int32Array) -> list[int]:
        """Make forks while rows and blocks last; the rows made, for the first of ``k``."""
        rows, size = self.rows, self.blocks.block_size
        starts = request.length + k
        room = np.minimum(self.policy.num_speculative_tokens, request.limit - starts - 1)
        first = starts // size
        counts = (starts + room) // size - first + 1
        fits = np.flatnonzero(np.cumsum(counts) > self.blocks.free_count)
        count = min(len(k), rows.free_count, int(fits[0]) if fits.size else len(k))
        self.counters["draft_narrowed"] += len(k) - count
        if count == 0:
            return []
        made = rows.take(count)
        index = np.array(made, np.int32)
        rows.block_table[index] = rows.block_table[request.trunk]
        blocks = self.blocks.take(int(counts[:count].sum()))
        sources, destinations, at = [], [], 0
        for row, start, block, own_count in zip(
            made, starts.tolist(), first.tolist(), counts.tolist(), strict=False
        ):
            own = blocks[at : at + own_count]
            at += own_count
            request.forks[row] = own
            rows.block_table[row, block : block + own_count] = [b.block_id for b in own]
            if start % size:
                sources.append(request.blocks[block].block_id)
                destinations.append(own[0].block_id)
        if sources:
            self.model.copy_blocks(sources, destinations)
        rows.start[index] = starts[:count]
        rows.computed[index] = starts[:count]
        rows.feed_token[index] = tokens[:count]
        rows.room[index] = room[:count]
        rows.stop[index] = request.stop
        rows.pending[index] = True
        rows.cache.add_forks(request.handle, k[:count], tokens[:count], index)
        self.counters["draft_forks"] += count
        return made

    def _announce_forks(
        self, request: Request, k: list[int], tokens: list[int], rows: list[int]
    ) -> None:
        new = self._forked.setdefault(request.handle, _NewForks(request, [], [], []))
        new.k.extend(k)
        new.tokens.extend(tokens)
        new.rows.extend(rows)

    def _drop_forks(self, request: Request) -> None:
        for own in request.forks.values():
            self.blocks.give_back(own)
        self.rows.give_back(list(request.forks))
        request.forks.clear()

    # ---- blocks

    def _wake(self, request: Request) -> None:
        """Give a request a trunk, its cached prefix, and the rest of its text to catch up with."""
        self.rows.cache.trees.pop(request.handle, None)
        if request.length >= request.limit - 1 or not self._free_a_row(request):
            return
        request.trunk = self.rows.take(1)[0]
        request.prefix.block_hashes.clear()
        text = request.text[: request.length].tolist()
        request.blocks = self.blocks.cached_prefix(text, request.prefix)
        request.shared_blocks = len(request.blocks)
        ids = [block.block_id for block in request.blocks]
        self.rows.block_table[request.trunk, : len(ids)] = ids
        self.rows.stop[request.trunk] = request.stop
        self._cut_back(request, len(ids) * self.blocks.block_size)
        self._plan(request, [])

    def _sleep(self, request: Request) -> None:
        """Take everything from a request but its text."""
        if request.trunk == DORMANT:
            return
        self._drop_forks(request)
        self.rows.give_back([request.trunk])
        self.blocks.give_back(request.blocks)
        request.blocks = []
        request.trunk = DORMANT
        request.forks_wanted = []
        self._catching_up.pop(request.handle, None)
        self.rows.cache.trees.pop(request.handle, None)
        self._planted.pop(request.handle, None)
        self._forked.pop(request.handle, None)
        self._withdrawn.add(request.handle)

    def _finish(self, request: Request) -> None:
        self._sleep(request)
        self._withdrawn.discard(request.handle)
        del self.requests[request.handle]

    def _cover(self, request: Request, length: int) -> bool:
        """See that the trunk has blocks for ``length`` positions; False if they cannot be had."""
        missing = -(-length // self.blocks.block_size) - len(request.blocks)
        if missing <= 0:
            return True
        while self.blocks.free_count < missing:
            if not self._evict(request):
                return False
        new = self.blocks.take(missing)
        first = len(request.blocks)
        self.rows.block_table[request.trunk, first : first + missing] = [b.block_id for b in new]
        request.blocks += new
        return True

    def _free_a_row(self, request: Request) -> bool:
        while self.rows.free_count == 0:
            if not self._evict(request):
                return False
        return True

    def _evict(self, wanting: Request) -> bool:
        """Make room: first forks go, then requests the target has not wanted lately.

        Requests the target wanted in this very frame keep their trunk: taking turns among them
        would draft for none.
        """
        for request in self.requests.values():
            if request.forks:
                self.counters["draft_narrowed"] += len(request.forks)
                self._drop_forks(request)
                request.forks_wanted = []
                self._plant(request)
                self._announce_forks(request, [], [], [])
                return True
        idle = [
            r
            for r in self.requests.values()
            if r is not wanting and r.trunk != DORMANT and r.last_used < self._frame
        ]
        if not idle:
            return False
        self.counters["draft_evictions"] += 1
        self._sleep(min(idle, key=lambda r: r.last_used))
        return True

    def _share_verified(self, request: Request) -> None:
        """Enter the full blocks of verified, computed tokens into the prefix cache."""
        size = self.blocks.block_size
        full = min(request.length, int(self.rows.computed[request.trunk])) // size
        if full > request.shared_blocks:
            tokens = request.text[request.shared_blocks * size : full * size].tolist()
            self.blocks.share(tokens, request.shared_blocks, request.prefix, request.blocks)
            request.shared_blocks = full

    # ---- publications

    def _begin_round(self) -> None:
        if self._round_began is None and self.has_work:
            self._round_began = time.perf_counter()

    def _planted_message(self) -> Planted:
        cache = self.rows.cache
        handles, bases, trunks, counts, ended = [], [], [], [], []
        tokens = [_NO_TOKENS]
        for request in self._planted.values():
            length = int(cache.length[request.trunk])
            handles.append(request.handle)
            bases.append(request.length)
            trunks.append(request.trunk)
            counts.append(length)
            ended.append(int(cache.ended[request.trunk]))
            tokens.append(cache.tokens[request.trunk, :length])
        for handle in self._withdrawn:
            handles.append(handle)
            bases.append(0)
            trunks.append(DORMANT)
            counts.append(0)
            ended.append(0)
        self._planted.clear()
        self._withdrawn.clear()
        return Planted(
            pack(handles),
            pack(bases),
            pack(trunks),
            pack(counts),
            pack(ended),
            pack(np.concatenate(tokens)),
        )

    def _forked_message(self) -> Forked:
        handles, counts, complete = [], [], []
        k: list[int] = []
        tokens: list[int] = []
        rows: list[int] = []
        for request, fork_k, fork_tokens, made in self._forked.values():
            handles.append(request.handle)
            counts.append(len(made))
            complete.append(int(request.next_k >= len(request.forks_wanted)))
            k += fork_k
            tokens += fork_tokens
            rows += made
        self._forked.clear()
        return Forked(
            pack(handles), pack(counts), pack(complete), pack(k), pack(tokens), pack(rows)
        )
