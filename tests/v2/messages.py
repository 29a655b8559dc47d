"""A draft that publishes at random, and the requests whose texts are looked up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from vllm_ssd.core.tree import Where
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.look_up import WHERE, Found, look_up
from vllm_ssd.wire.messages import Forked, Planted, Pruned, Ready, Stepped
from vllm_ssd.wire.packing import pack, pack_floats

DEPTH, VOCAB_SIZE, ROWS, SLOTS, MAX_LENGTH = 2, 4, 8, 2, 20
WIDTH = 2 * DEPTH + 2
"""Of a row. All is small, so that random texts often follow a tree and rows are used again."""
TOKENS = st.integers(0, VOCAB_SIZE - 1)
BASES = st.integers(0, 2)


@dataclass
class Request:
    """A request with its tree, as the draft knows it."""

    handle: int
    slot: int
    base: int = 0
    trunk: int = -1
    forks: dict[tuple[int, int], int] = field(default_factory=dict)
    """The row of each outcome."""
    given_up: list[tuple[int, int]] = field(default_factory=list)
    """Outcomes that had a row once."""

    @property
    def rows(self) -> list[int]:
        """The rows of its tree."""
        return [self.trunk, *self.forks.values()] if self.trunk >= 0 else []


class RandomDraft:
    """Publishes to several copies of the trees at once; rows are used as a draft uses them."""

    def __init__(self, data: Any, *copies: PublishedTrees) -> None:
        self.requests: dict[int, Request] = {}
        """By slot."""
        self._draw = data.draw
        self._copies = copies
        self._lengths = [0] * ROWS
        self._ended: set[int] = set()
        self._handles = 0
        for copy in copies:
            copy.start(Ready(ROWS, 100, 16))

    def begin(self) -> Request:
        """A request takes a slot, from one that has finished if there is none left."""
        slot = self._draw(st.integers(0, SLOTS - 1))
        if slot in self.requests:
            for copy in self._copies:
                copy.drop(self.requests[slot].handle)
        self._handles += 1
        self.requests[slot] = request = Request(self._handles, slot)
        for copy in self._copies:
            copy.announce(request.handle)
            if hasattr(copy, "assign"):
                copy.assign(request.handle, slot)
        return request

    def publish_trees(self) -> None:
        """Requests in all slots, most of them with a tree that has forks."""
        while len(self.requests) < SLOTS:
            self.begin()
        for kind in (self._plant, self._fork, self._step, self._step):
            kind()

    def publish(self) -> None:
        """One message, whatever is possible now."""
        requests = list(self.requests.values())
        if not requests:
            self.begin()
            return
        actions = [self.begin, self._plant, self._fork, self._prune, self._step]
        self._draw(st.sampled_from([*actions, self._plant, self._fork, self._fork, self._step]))()

    @property
    def _free(self) -> list[int]:
        used = {row for request in self.requests.values() for row in request.rows}
        return [row for row in range(ROWS) if row not in used]

    def _some(self, planted: bool) -> list[Request]:
        known = [r for r in self.requests.values() if r.trunk >= 0 or not planted]
        if not known:
            return []
        return self._draw(
            st.lists(st.sampled_from(known), min_size=1, unique_by=lambda request: request.slot)
        )

    def _tell(self, kind: str, message: Any) -> None:
        for copy in self._copies:
            getattr(copy, kind)(message)

    def _plant(self) -> None:
        """Next trees of some requests: on rows of their own, on free rows, or none."""
        draw, requests = self._draw, self._some(planted=False)
        tokens: list[int] = []
        columns: list[tuple[int, int, int, int, int]] = []
        for request in requests:
            rows = request.rows + self._free
            request.trunk = draw(st.sampled_from([*rows, -1])) if rows else -1
            request.given_up += request.forks
            request.forks = {}
            gone = request.trunk < 0
            new = [] if gone else draw(st.lists(TOKENS, max_size=WIDTH - 1))
            request.base = draw(BASES)
            ended = bool(new) and draw(st.booleans())
            self._set(request.trunk, len(new), ended)
            columns.append((request.handle, request.base, request.trunk, len(new), ended))
            tokens += new
        chances = np.full(len(tokens), 0.5, np.float32)
        handles, bases, trunks, counts, ends = (
            pack(list(column)) for column in zip(*columns, strict=True)
        )
        self._tell(
            "plant",
            Planted(handles, bases, trunks, counts, ends, pack(tokens), pack_floats(chances)),
        )

    def _fork(self) -> None:
        draw, requests = self._draw, self._some(planted=True)
        made: list[tuple[int, int, int]] = []
        counts, complete = [], []
        for request in requests:
            free, before = self._free, len(made)
            rows = draw(st.lists(st.sampled_from(free), max_size=3, unique=True)) if free else []
            for row in rows:
                outcome = draw(st.integers(0, self._lengths[request.trunk])), draw(TOKENS)
                if outcome not in request.forks:
                    request.forks[outcome] = row
                    self._set(row, 1, False)
                    made.append((*outcome, row))
            counts.append(len(made) - before)
            complete.append(int(draw(st.booleans())))
        handles = pack([request.handle for request in requests])
        k, tokens, rows = (pack([each[i] for each in made]) for i in range(3))
        message = Forked(handles, pack(counts), pack(complete), k, tokens, rows)
        self._tell("fork", message)

    def _prune(self) -> None:
        draw, requests, gone = self._draw, self._some(planted=True), []
        counts = []
        for request in requests:
            outcomes = sorted(request.forks)
            lost = draw(st.lists(st.sampled_from(outcomes), unique=True)) if outcomes else []
            request.given_up += lost
            gone += [request.forks.pop(outcome) for outcome in lost]
            counts.append(len(lost))
        handles = pack([request.handle for request in requests])
        self._tell("prune", Pruned(handles, pack(counts), pack(gone)))

    def _step(self) -> None:
        """Some rows grow, by one step or two."""
        draw = self._draw
        steps = draw(st.integers(1, 2))
        growing = [
            row
            for request in self.requests.values()
            for row in request.rows
            if row not in self._ended and self._lengths[row] + steps <= WIDTH
        ]
        if not growing:
            return
        rows = draw(st.lists(st.sampled_from(growing), min_size=1, unique=True))
        chances = pack_floats(np.full(len(rows), 0.5, np.float32))
        messages = []
        for last in [False] * (steps - 1) + [True]:
            tokens = draw(st.lists(TOKENS, min_size=len(rows), max_size=len(rows)))
            ended = draw(st.lists(st.sampled_from(rows), unique=True)) if last else []
            messages.append(Stepped(pack(rows), pack(tokens), pack(ended), chances))
        for row in rows:
            self._set(row, self._lengths[row] + steps, row in ended)
        self._tell("steps", messages)

    def _set(self, row: int, length: int, ended: bool) -> None:
        if row >= 0:
            self._lengths[row] = length
            self._ended.discard(row)
            if ended:
                self._ended.add(row)


class Texts(NamedTuple):
    """The state of the runner's slots (``RequestState``), of which all are in the batch."""

    tokens: torch.Tensor
    """``[slots, MAX_LENGTH]`` int32."""
    lengths: torch.Tensor
    """``[slots]`` int32."""
    num_sampled: torch.Tensor
    """``[slots]`` int32."""

    @property
    def last(self) -> torch.Tensor:
        """``[slots, 1]`` int64, the last token of each."""
        return self.tokens.gather(1, (self.lengths.long() - 1).clamp(min=0)[:, None]).long()


def draw_texts(data: Any, draft: RandomDraft, published: PublishedTrees) -> Texts:
    """Texts of which most follow their trees, up to a fork and beyond."""
    tokens = np.array(data.draw(st.lists(TOKENS, min_size=8, max_size=8)), np.int32)
    texts = np.resize(tokens, (SLOTS, MAX_LENGTH))
    lengths = np.full(SLOTS, 1, np.int32)
    for slot, request in draft.requests.items():
        path = _path(data, request, published)
        path = path[: data.draw(st.integers(0, len(path)))]
        path += data.draw(st.lists(TOKENS, max_size=2))
        texts[slot, request.base : request.base + len(path)] = path
        lengths[slot] = max(1, request.base + len(path))
    sampled = data.draw(st.lists(st.integers(0, DEPTH + 1), min_size=SLOTS, max_size=SLOTS))
    return Texts(torch.from_numpy(texts), torch.from_numpy(lengths), torch.tensor(sampled).int())


def _path(data: Any, request: Request, published: PublishedTrees) -> list[int]:
    """Along the trunk, or down a fork that is there, or where one was once."""
    if request.trunk < 0:
        return []
    trunk = published.cache.row_tokens(request.trunk)
    outcomes = [None, *request.forks, *request.given_up[-3:]]
    outcome = data.draw(st.sampled_from(outcomes))
    if outcome is None:
        return trunk
    k, token = outcome
    row = request.forks.get(outcome)
    return trunk[:k] + ([token] if row is None else published.cache.row_tokens(row))


def look_up_one(trees: DeviceTrees, slot: int, text: list[int], sampled: int = 1) -> Found:
    """What the device finds after a text in a slot."""
    slots = len(trees.roots)
    texts = torch.zeros(slots, len(text), dtype=torch.int32)
    texts[slot] = torch.tensor(text)
    return look_up(
        trees,
        texts,
        torch.full([slots], len(text), dtype=torch.int32),
        torch.full([slots, 1], text[-1]),
        torch.tensor([slot]),
        torch.tensor([sampled]),
    )


def look_up_all(trees: Any, texts: Texts) -> Found:
    """Look up all slots, last first."""
    slots = torch.arange(SLOTS).flip(0)
    found = look_up(trees, texts.tokens, texts.lengths, texts.last, slots, texts.num_sampled[slots])
    return Found(*(part.flip(0) for part in found))


class Answer(NamedTuple):
    """What is found for one slot."""

    drafts: list[int]
    """``[K]``."""
    drafted: int
    ended: int
    where: Where

    @property
    def found(self) -> list[int]:
        """Those of the draft."""
        return self.drafts[: self.drafted]


def answers(found: Found) -> list[Answer]:
    """The same as lists, by slot."""
    columns = (part.tolist() for part in found[:4])
    return [Answer(d, n, ended, WHERE[w]) for d, n, ended, w in zip(*columns, strict=True)]


def expected(published: PublishedTrees, draft: RandomDraft, texts: Texts) -> list[Answer]:
    """The answers by the walk of the core, as V1 takes them (``lookup.answer``)."""
    result = []
    for slot in range(SLOTS):
        drafted: list[int] = []
        where, ended = Where.UNKNOWN, 0
        request = draft.requests.get(slot)
        tree = None if request is None else published.cache.trees.get(request.handle)
        length = int(texts.lengths[slot])
        if request and tree and texts.num_sampled[slot] > 0:
            text = texts.tokens[slot, tree.base : length].tolist()
            (below,) = published.cache.look_up([request.handle], [text])
            where, ended = below.where, int(below.ended)
            drafted = below.drafted[: len(below.drafted) - below.ended][:DEPTH]
        fill = [int(texts.last[slot, 0])] * (DEPTH - len(drafted))
        result.append(Answer(drafted + fill, len(drafted), ended, where))
    return result
