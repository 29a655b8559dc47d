"""The messages. Tokens travel, never tensors; arrays are little-endian int32 in ``bytes``, or
float32 where that is said (:mod:`vllm_ssd.wire.packing`).

Messages travel in frames. A frame carries the *epoch*, a number the target raises whenever the two
sides may be out of step (a restart, a dropped or garbled frame), and its number within the epoch.
A side that sees a gap asks for a new epoch, in which every live request is announced again: there
is one way to recover, whatever went wrong.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

PROTOCOL = 1
"""Raised with every change of the messages: both sides must have the same."""
MAX_PEER_MESSAGES = 64
"""Of a frame to a draft server, which takes a frame in as a whole; a target sends a handful."""
MAX_ROWS = 1024
"""Rows of the draft's batch, however many requests there are."""
MAX_STOP_TOKENS = 8
"""End tokens of a request that the draft checks; it goes on past any further ones."""
MAX_EPOCH_JUMP = 1 << 20
"""Neither side gets this many epochs ahead of the other: such a frame is garbage."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


# ---- target to draft


class Setup(Message, frozen=True):
    """First message to a draft process of the target's own: how to bring the model up."""

    engine_args: dict[str, Any]
    """Arguments of vLLM's ``EngineArgs`` for the draft model."""
    num_speculative_tokens: int
    """The most that a target may ask for."""
    max_branches: int
    """The most branches that a request can have."""
    enable_prefix_caching: bool
    vocab_size: int
    """Ids from there on are never drafted."""
    draft_vocab: bytes = b""
    """The tokens the head is computed for, int32; empty for all."""
    draft_top_n: int = 0
    """Sampled tokens come from so many of the draft's best; 0: none are sampled."""
    load_early: bool = False
    """Load the weights and compile at once, without waiting for :class:`Allocate`."""


class Allocate(Message, frozen=True):
    """The target has its memory: load the weights and allocate the KV cache."""

    kv_cache_memory_bytes: int


class Join(Message, frozen=True):
    """What a target wants of a draft. :class:`Ready` or :class:`Failed` is the answer."""

    protocol: int
    """The target's :data:`PROTOCOL`."""
    vocabulary: str
    """A hash of its tokenizer's vocabulary (:mod:`vllm_ssd.vocabulary`); empty if the two were
    compared already."""
    vocab_size: int
    """Ids from there on mean nothing to it."""
    num_speculative_tokens: int
    """K."""
    fan_out: list[int]
    """The most ``t*`` to guess after k accepted tokens, for k = 0..K; empty for no such cap."""
    branches: int
    """Branches per request, the trunk being one; 0 for as many as the measured times afford."""
    max_branches: int
    """The most branches a request can have."""
    draft_sampling: str = "greedy"
    """``"greedy"``, ``"probabilistic"`` or ``"auto"``: how tokens are drafted for requests with a
    temperature."""
    draft_top_n: int = 0
    """The target has room for so many tokens that one is sampled from."""
    saguaro_c: float = 1.0
    """C of arXiv 2603.03251, Definition 14; -1: learned."""
    stay: bool = True
    """False: only asks whether it could join."""


class Start(Message, frozen=True):
    """A request to draft for, new or announced again."""

    handle: int
    tokens: bytes
    """Its whole confirmed text, int32."""
    limit: int
    """No token is drafted at this position or later (model length, ``max_tokens``)."""
    stop: list[int]
    """Token ids that end it."""
    temperature: float = 0.0
    """Its drafts may be sampled, at this temperature; 0: they are the draft's first choices."""
    top_k: int = 0
    """Of so many best tokens; 0: no such bound."""
    top_p: float = 1.0


class Verified(Message, frozen=True):
    """What verification confirmed, and what is proposed now. One entry per request and array."""

    handles: bytes
    lengths: bytes
    """Length of the confirmed text before ``confirmed`` is added."""
    confirmed_counts: bytes
    proposed_counts: bytes
    """-1: not decided yet, the target waits for more of the trunk; :class:`Proposed` follows."""
    tokens: bytes
    """For each request its confirmed tokens, then the proposed ones, all in one row."""
    verify_us: int
    """How long the last verification took (from one proposal to the next outcome); 0: unknown."""
    speculate: bool = True
    """False: nothing will be proposed after this verification; only the texts are kept."""
    price: float = 0.0
    """What verifying one more token costs, in tokens of the whole batch; 0.0 if that is not
    known."""


class Proposed(Message, frozen=True):
    """What is proposed for requests that the target waited for."""

    handles: bytes
    counts: bytes
    tokens: bytes
    """The proposed tokens of each, all in one row. They need not be the trunk's."""


class Trimmed(Message, frozen=True):
    """The scheduler has cut proposals: fewer tokens are verified than were proposed."""

    handles: bytes
    verified_counts: bytes


class Finished(Message, frozen=True):
    """Requests that need no drafts any more."""

    handles: bytes


# ---- draft to target


class Ready(Message, frozen=True):
    """The draft model is up, and drafts for the target that has joined."""

    max_rows: int
    num_blocks: int
    block_size: int
    max_model_len: int = 0
    """Longest text that it follows; 0: as long as the target has set it up for."""
    model: str = ""
    """Its name."""


class Failed(Message, frozen=True):
    """The draft model cannot be brought up, or cannot draft for this target."""

    reason: str


class Progress(Message, frozen=True):
    """What the draft does to bring its model up."""

    what: str
    """A verb and its object, as ``"loads the weights"``."""


class Planted(Message, frozen=True):
    """Trees that replace the requests' former ones (:meth:`SpeculationCache.plant`)."""

    handles: bytes
    bases: bytes
    trunks: bytes
    """Trunk rows; -1: this request has no tree now."""
    counts: bytes
    """Trunk tokens known so far."""
    ended: bytes
    """1 where the trunk ends after them (end token, length)."""
    tokens: bytes
    chances: bytes
    """float32, one a token, as in :class:`Stepped`."""


class Forked(Message, frozen=True):
    """Forks added to trees (:meth:`SpeculationCache.add_forks`), grouped by request."""

    handles: bytes
    counts: bytes
    complete: bytes
    """1 where no more forks will come for this tree."""
    k: bytes
    tokens: bytes
    rows: bytes


class Pruned(Message, frozen=True):
    """Forks taken off trees (:meth:`SpeculationCache.prune`), grouped by request."""

    handles: bytes
    counts: bytes
    rows: bytes


class Stepped(Message, frozen=True):
    """One decode step: each row grows by one token (:meth:`SpeculationCache.append`)."""

    rows: bytes
    tokens: bytes
    ended: bytes
    """Rows that end with this token."""
    chances: bytes
    """float32, one a row: the chance that its token is accepted if those before it are."""
    sampled: bytes = b""
    """Which of ``rows``, by index, grew by a token that was sampled; the others' was certain."""
    supports: bytes = b""
    """For each of these, from how many tokens it was sampled."""
    q_tokens: bytes = b""
    """``[sum(supports)]``, these tokens, different ones for each."""
    q_probabilities: bytes = b""
    """``[sum(supports)]`` float32, their probabilities, above 0, as sampled from."""


class Report(Message, frozen=True):
    """Counters of the draft process since it started."""

    counters: dict[str, float]
    step_seconds: bytes = b""
    """float32, of the decode steps since the last report, the newest 1,024 at most."""
    gauges: dict[str, float] = {}
    """How things are now."""


class Alive(Message, frozen=True):
    """Still at work on a long step."""


class Lost(Message, frozen=True):
    """A gap in the target's frames: a new epoch is needed."""


FromPeer = Join | Start | Verified | Proposed | Trimmed | Finished
"""To a draft server, which brings its own model up: nothing that a peer says has a say in that."""
ToDraft = Setup | Allocate | FromPeer
ToTarget = Ready | Failed | Progress | Planted | Forked | Pruned | Stepped | Report | Alive | Lost


class DraftBound(msgspec.Struct, frozen=True, array_like=True):
    """A frame from the target."""

    epoch: int
    number: int
    messages: list[ToDraft]


class ServerBound(msgspec.Struct, frozen=True, array_like=True):
    """The same to a draft server."""

    epoch: int
    number: int
    messages: Annotated[list[FromPeer], msgspec.Meta(max_length=MAX_PEER_MESSAGES)]


class TargetBound(msgspec.Struct, frozen=True, array_like=True):
    """A frame from the draft."""

    epoch: int
    number: int
    messages: list[ToTarget]
